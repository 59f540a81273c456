"""What the GPU tests share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from stem_attention import BlockSelection, StemConfig
from stem_attention.testing import exact_attention, relative_error, token_mask, worst_row_error
from stem_attention.testing.packed import borders, to_pages
from stem_attention.testing.poison import new_memory_is_nan

__all__ = [
    "SPARSE",
    "assert_accurate",
    "at_most_extra_bytes",
    "borders",
    "differing_rate",
    "new_memory_is_nan",
    "no_synchronisation",
    "on_gpu",
    "paged",
    "random_qkv",
]

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees")]

SPARSE = StemConfig(dense_below=0)
MIB, GIB = 1 << 20, 1 << 30


def free_memory() -> int:
    """Bytes of the current GPU that nobody has taken; 0 without one."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


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


def paged(x: Tensor, cu_seqlens: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """:func:`to_pages` for cumulative lengths."""
    return to_pages(x, cu_seqlens.diff().tolist(), page)


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
def at_most_extra_bytes(limit: int) -> Iterator[None]:
    """At no time may more than ``limit`` bytes be allocated beyond what there was."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= limit, f"{extra / 2**20:.1f} MiB of {limit / 2**20:.1f} MiB"
