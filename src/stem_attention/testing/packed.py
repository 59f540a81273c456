"""Packed batches: where their sequences lie, and keys scattered over the pages of a cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

_NO_PAGE = 1 << 30
_SPARE_PAGES = 3


def borders(lengths: Sequence[int]) -> Tensor:
    """int32 cumulative lengths, on the CPU."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def to_pages(x: Tensor, lengths: Sequence[int], page_size: int, by: float = math.nan) -> tuple[Tensor, Tensor]:
    """A cache of shuffled pages and its page table; unused entries of the table name no page.

    Args:
        x: ``(total, heads, dim)``, sequences one after the other.
        lengths: Of the sequences.
        page_size: Tokens per page.
        by: What lies wherever no token does, in spare pages too.

    Returns:
        ``(pages, page_size, heads, dim)``, and int32 ``(sequences, max_pages)``. The same for the same lengths and pages.
    """
    needed = [-(-length // page_size) for length in lengths]
    order = torch.randperm(sum(needed) + _SPARE_PAGES, generator=torch.Generator().manual_seed(page_size))
    cache = x.new_full((len(order), page_size, *x.shape[1:]), by)
    table = torch.full((len(lengths), max(needed) + 1), _NO_PAGE, dtype=torch.int32)
    used = start = 0
    for i, (pages, length) in enumerate(zip(needed, lengths, strict=True)):
        mine = order[used : used + pages]
        table[i, :pages] = mine
        slots = (mine[:, None] * page_size + torch.arange(page_size)).flatten()[:length]
        cache.view(-1, *x.shape[1:])[slots.to(x.device)] = x[start : start + length]
        used, start = used + pages, start + length
    return cache, table.to(x.device)
