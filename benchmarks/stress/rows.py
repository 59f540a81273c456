"""What rows of synthetic tasks are drawn with, on the generator's device: numbers, filler, and items set into rows."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from stem_attention.errors import bad_argument

_SENTENCE = 32
_SUCCESSORS = 8


def place(times: Tensor, widths: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
    """Where items begin that follow each other by ``times``, with random gaps; the last one ends the row."""
    free = ids.shape[1] - 1 - int(widths.sum())
    if free < 0:
        raise bad_argument("length", f"at least {ids.shape[1] - free}", ids.shape[1], "ask for longer rows or less in them")
    order = times.argsort(1)
    ahead = widths[order].cumsum(1) - widths[order]
    gaps = integers(free + 1, tuple(times.shape), generator).sort(1).values
    gaps[:, -1] = free
    return torch.empty_like(order).scatter_(1, order, 1 + gaps + ahead)


def write(ids: Tensor, starts: Tensor, items: Tensor) -> None:
    """Set items ``(rows, n, width)`` into rows at ``starts`` ``(rows, n)``."""
    where = starts[..., None] + torch.arange(items.shape[-1], device=ids.device)
    ids.scatter_(1, where.flatten(1), items.flatten(1))


def later(times: Tensor, generator: torch.Generator) -> Tensor:
    """A time after each of these, up to 1; the last column comes after everything."""
    later = times + (1 - times) * uniform(tuple(times.shape), generator)
    later[:, -1] = 2.0
    return later


def distinct(rows: int, total: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` different numbers below ``total`` for each row, in random order."""
    return uniform((rows, total), generator).argsort(1)[:, :count]


def uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """fp32 from 0 to 1."""
    return torch.rand(shape, generator=generator, device=generator.device)


def integers(high: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Whole numbers below ``high``."""
    return torch.randint(high, shape, generator=generator, device=generator.device)


def _zipf(count: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Numbers below ``count``, n with a chance of about 1 / (n + 1)."""
    return ((count + 1) ** uniform(shape, generator)).long().sub_(1).clamp_(max=count - 1)


@lru_cache
def _successors(filler: int, device: torch.device) -> Tensor:
    """What may follow each filler id; part of the vocabulary, hence the same everywhere."""
    return _zipf(filler, (filler, _SUCCESSORS), torch.Generator().manual_seed(0)).to(device)


def sentences(count: int, rows: int, length: int, generator: torch.Generator) -> Tensor:
    """Numbers below ``count``: sentences of a Markov chain, each begun with a draw from Zipf's law."""
    shape = (rows, -(-length // _SENTENCE))
    table = _successors(count, generator.device)
    state = _zipf(count, shape, generator)
    walk, steps = [state], _zipf(_SUCCESSORS, (_SENTENCE - 1, *shape), generator)
    for step in steps:
        state = table[state, step]
        walk.append(state)
    return torch.stack(walk, -1).flatten(1)[:, :length].contiguous()
