"""What the GPU tests share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

from stem_attention import BlockSelection, StemConfig
from stem_attention.testing import exact_attention, relative_error, token_mask, worst_row_error

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees")]

SPARSE = StemConfig(dense_below=0)


def random_qkv(
    batch: int,
    q_len: int,
    kv_len: int,
    q_heads: int,
    kv_heads: int,
    dim: int,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal numbers drawn on the device, for sizes at which ``testing.make_qkv`` would take too long."""
    draw = torch.Generator("cuda").manual_seed(seed)
    shapes = ((batch, q_len, q_heads, dim), (batch, kv_len, kv_heads, dim), (batch, kv_len, kv_heads, dim))
    q, k, v = (torch.randn(shape, generator=draw, device="cuda", dtype=dtype) for shape in shapes)
    return q, k, v


def assert_accurate(out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection) -> None:
    """The error against fp64 is at most 1.1 times that of torch's own attention, and of no row more than twice its worst."""
    mask = token_mask(selection)
    exact, exact_lse = exact_attention(q, k, v, mask)
    group = q.shape[2] // k.shape[2]
    heads_first = (q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(group, 1) for x in (k, v)))
    sdpa = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)
    slack = torch.finfo(q.dtype).eps / 50  # of a few numbers the mean error is itself a matter of chance
    assert relative_error(out, exact) <= 1.1 * relative_error(sdpa, exact) + slack
    assert worst_row_error(out, exact) <= 2 * worst_row_error(sdpa, exact) + slack
    if lse is not None:
        torch.testing.assert_close(lse, exact_lse.float(), atol=2e-5, rtol=2e-5)


def differing_rate(got: BlockSelection, expected: BlockSelection) -> float:
    """Blocks that just one of two selections keeps, over the blocks that are kept."""
    a, b = got.to_mask(), expected.to_mask()
    return (a != b).sum().item() / b.sum().item()


def borders(lengths: list[int]) -> Tensor:
    """int32 cumulative lengths, on the CPU."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def paged(x: Tensor, cu_seqlens: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """A cache of shuffled pages, NaN wherever no key lies, and its table; unused entries of the table name no page."""
    starts = cu_seqlens.tolist()
    needed = [-(-(high - low) // page) for low, high in pairwise(starts)]
    order = torch.randperm(sum(needed) + 3, generator=torch.Generator().manual_seed(page))
    cache = x.new_full((sum(needed) + 3, page, *x.shape[1:]), math.nan)
    table = torch.full((len(needed), max(needed) + 1), 1 << 30, dtype=torch.int32)
    taken = 0
    for i, (low, high) in enumerate(pairwise(starts)):
        pages = order[taken : taken + needed[i]]
        taken += needed[i]
        table[i, : needed[i]] = pages
        slots = (pages[:, None] * page + torch.arange(page)).flatten()[: high - low]
        cache.view(-1, *x.shape[1:])[slots.to(x.device)] = x[low:high]
    return cache, table.to(x.device)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """torch raises where the host would wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def new_memory_is_nan() -> Iterator[None]:
    """``torch.empty`` gives NaN, so that a number which nobody writes shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(False)


@contextmanager
def at_most_extra_bytes(limit: int) -> Iterator[None]:
    """At no time may more than ``limit`` bytes be allocated beyond what there was."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= limit, f"{extra / 2**20:.1f} MiB of {limit / 2**20:.1f} MiB"
