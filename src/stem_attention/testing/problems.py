"""Random problems: every shape, dtype, layout, config and way to call that the library promises to take."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from random import Random
from typing import Any

import torch

from stem_attention.config import StemConfig
from stem_attention.testing.inputs import LAYOUTS

KINDS = ("lists", "whole", "chunks", "packed")
"""Attention over random lists; selection and attention; the same in chunks of a prompt; packed batches, with pages or not."""

_PRIMES = (2, 3, 5, 7, 13, 31, 61, 127, 131, 257, 509, 1021, 2039, 2053, 3001, 4093, 4999)


@dataclass(frozen=True)
class Space:
    """What problems are drawn from.

    Attributes:
        head_dims: Widths of a head.
        groups: Query heads per key/value head.
        block_sizes: Tokens per block.
        dtypes: Names of torch dtypes.
        page_sizes: Tokens per page of a paged cache.
        longest: Most keys of a sequence.
        work: Most pairs of a query and a key over all heads and sequences, which bounds time and memory.
        presets: Draw configs from the presets alone, where each new one costs a compilation.
    """

    head_dims: tuple[int, ...] = (16, 17, 24, 40, 64, 80, 96, 128, 192, 256)
    groups: tuple[int, ...] = tuple(range(1, 17))
    block_sizes: tuple[int, ...] = (16, 32, 48, 64, 128)
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16", "float64")
    page_sizes: tuple[int, ...] = (1, 7, 16, 64, 256)
    longest: int = 5000
    work: int = 1 << 18
    presets: bool = False


@dataclass(frozen=True)
class Problem:
    """One call, small enough to print: the same problem gives the same numbers everywhere."""

    kind: str
    seed: int
    lengths: tuple[tuple[int, int], ...]
    """``(q_len, kv_len)`` of every sequence; but for ``"packed"`` they are all the same."""
    prompt_extra: int
    """Tokens of the prompt that are still to come."""
    kv_heads: int
    group: int
    head_dim: int
    dtype: str
    layout: str
    surrounded: bool
    structured: bool
    return_lse: bool
    density: float
    page_size: int
    """0: keys are packed too."""
    config: StemConfig

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, for a report."""
        return {**asdict(self), "config": self.config.to_dict()}


def draw_problem(draw: Random, space: Space) -> Problem:
    """A problem of ``space``; the same one for the same state of ``draw``."""
    kind = draw.choice(KINDS)
    block_size = draw.choice(space.block_sizes)
    kv_heads, group = draw.choice((1, 1, 2, 3)), draw.choice(space.groups)
    sequences = draw.randint(1, 5) if kind == "packed" else draw.choice((1, 1, 1, 2, 3))
    lengths = [_lengths(draw, space, block_size, space.work // (sequences * kv_heads * group)) for _ in range(sequences)]
    if kind == "packed" and draw.random() < 0.3:
        lengths[draw.randrange(sequences)] = (0, draw.choice((0, lengths[0][1])))
    return Problem(
        kind=kind,
        seed=draw.randrange(1 << 30),
        lengths=tuple(lengths) if kind == "packed" else (lengths[0],) * sequences,
        prompt_extra=draw.choice((0, 0, 1, block_size, 3 * block_size + 5, 2000)),
        kv_heads=kv_heads,
        group=group,
        head_dim=draw.choice(space.head_dims),
        dtype=draw.choice(space.dtypes),
        layout=draw.choice(LAYOUTS),
        surrounded=draw.random() < 0.5,
        structured=draw.random() < 0.5,
        return_lse=draw.random() < 0.5,
        density=draw.choice((0.0, 0.1, 0.4, 1e9)),
        page_size=draw.choice((0, *space.page_sizes)) if kind == "packed" else 0,
        config=_with_factors(draw, _config(draw, block_size, space.presets), kv_heads * group),
    )


def _lengths(draw: Random, space: Space, block_size: int, pairs: int) -> tuple[int, int]:
    """Any length, a prime, or a neighbour of a block border; as many queries as the work allows."""
    longest = max(1, min(space.longest, pairs))
    style = draw.randrange(8)
    if style == 0:
        kv_len = draw.randint(1, longest)
    elif style == 1:
        kv_len = draw.choice(_PRIMES)
    else:
        kv_len = round(math.exp(draw.uniform(0, math.log(longest))))
        if style > 4:
            kv_len = -(-kv_len // block_size) * block_size + draw.choice((-1, 0, 1))
    kv_len = max(1, min(kv_len, longest))
    q_len = draw.choice((kv_len, kv_len, 1, draw.randint(1, kv_len), max(1, kv_len - block_size)))
    return max(1, min(q_len, pairs // kv_len)), kv_len


def _config(draw: Random, block_size: int, presets: bool) -> StemConfig:
    dense_below = draw.choice((0, 0, 0, 300))
    if presets:
        preset: Callable[..., StemConfig] = draw.choice(
            (StemConfig, StemConfig.paper, StemConfig.angelslim, partial(StemConfig.mass, key_pool=16))
        )
        return preset(block_size=block_size, dense_below=dense_below)
    divisors = [size for size in range(1, block_size + 1) if block_size % size == 0]
    if draw.random() < 0.2:
        return StemConfig.mass(
            block_size=block_size,
            share=draw.choice((0.1, 1.0, 3.0, 10.0)),
            spread=draw.choice((0.0, 0.1, 0.5, 2.0)),
            query_pool=draw.choice(divisors),
            key_pool=draw.choice(divisors),
            sink_blocks=draw.choice((0, 1, 4)),
            local_blocks=draw.choice((1, 2, 4)),
            tail_blocks=draw.choice((0, 1, 2)),
            dense_below=dense_below,
        )
    ratio = draw.choice((0.05, 0.2, 0.5, 1.0))
    return StemConfig(
        block_size=block_size,
        stride=draw.choice(divisors),
        beta=draw.choice((0.0, 0.2, 1.0)),
        magnitude=draw.choice(("log", "log", "zscore", "none")),
        decay=draw.choice((0.3, 0.7, 1.0)),
        schedule=draw.choice(("smooth", "step", "angelslim")),
        ratio_short=ratio,
        ratio_long=ratio * draw.choice((0.5, 1.0)),
        knee_tokens=draw.choice((200, 1000, 16384)),
        min_blocks=draw.choice((None, 1, 4)),
        sink_blocks=draw.choice((0, 1, 4)),
        local_blocks=draw.choice((1, 2, 4)),
        tail_blocks=draw.choice((0, 1, 2)),
        forced=draw.choice(("inside", "inside", "extra")),
        dense_below=dense_below,
    )


def _with_factors(draw: Random, config: StemConfig, heads: int) -> StemConfig:
    """By mass, half of the time: a share of its own for each head."""
    if config.keep != "mass" or draw.random() < 0.5:
        return config
    return replace(config, head_factors=(tuple(draw.choice((0.1, 0.5, 1.0, 1.7, 4.0)) for _ in range(heads)),))


def torch_dtype(problem: Problem) -> torch.dtype:
    """Of a problem's tensors."""
    dtype = getattr(torch, problem.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype
