"""Packed batches: where their sequences lie, and keys scattered over the pages of a cache."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

_NO_PAGE = 1 << 30
_SPARE_PAGES = 3


def borders(lengths: Sequence[int]) -> Tensor:
    """Return the int32 cumulative lengths ``(sequences + 1,)``, on the CPU."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def pack(sequences: Sequence[tuple[Tensor, Tensor, Tensor]], page_size: int = 0, fill: float = math.nan) -> dict[str, Any]:
    """Return the tensors and lengths that :func:`stem_attention.stem_attention_varlen` takes, by name.

    Args:
        sequences: q, k and v of each, ``(1, length, heads, dim)`` as :func:`make_qkv` makes them.
        page_size: Tokens per page of the cache that keys and values go to; 0 packs them like the queries.
        fill: As in :func:`to_pages`.
    """
    q, k, v = (torch.cat(parts, 1)[0] for parts in zip(*sequences, strict=True))
    q_lens, kv_lens = ([part[i].shape[1] for part in sequences] for i in (0, 1))
    table = None
    if page_size:
        (k, table), (v, _) = (to_pages(x, kv_lens, page_size, fill) for x in (k, v))
    lengths = {"max_seqlen_q": max(q_lens), "max_seqlen_k": max(kv_lens), "page_table": table}
    return {"q": q, "k": k, "v": v, "cu_seqlens_q": borders(q_lens), "cu_seqlens_k": borders(kv_lens), **lengths}


def to_pages(x: Tensor, lengths: Sequence[int], page_size: int, fill: float = math.nan) -> tuple[Tensor, Tensor]:
    """Scatter packed keys or values over a cache of shuffled pages.

    Args:
        x: ``(total, heads, dim)``, sequences one after the other.
        lengths: Of the sequences.
        page_size: Tokens per page.
        fill: Number that lies wherever no token does, in spare pages too.

    Returns:
        The cache ``(pages, page_size, heads, dim)``, and its page table, int32 ``(sequences, max_pages)``, whose unused
        entries name no page. The same for the same lengths and pages.
    """
    needed = [-(-length // page_size) for length in lengths]
    order = torch.randperm(sum(needed) + _SPARE_PAGES, generator=torch.Generator().manual_seed(page_size))
    cache = x.new_full((len(order), page_size, *x.shape[1:]), fill)
    table = torch.full((len(lengths), max(needed) + 1), _NO_PAGE, dtype=torch.int32)
    used = start = 0
    for i, (pages, length) in enumerate(zip(needed, lengths, strict=True)):
        mine = order[used : used + pages]
        table[i, :pages] = mine
        slots = (mine[:, None] * page_size + torch.arange(page_size)).flatten()[:length]
        cache.view(-1, *x.shape[1:])[slots.to(x.device)] = x[start : start + length]
        used, start = used + pages, start + length
    return cache, table.to(x.device)
