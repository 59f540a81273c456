"""Choose the blocks of one row: the exact k-th largest score by bisection over ordered bits, then an ascending list.

One program per row and head, the whole row in registers. The threshold is found bit by bit from the first bit in which the
row's scores differ (at most 32 counts), so the result is exact and deterministic; blocks that tie with it are taken from
the smallest id on. NaN ranks above everything.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stem_attention.backends.triton.geometry import key_span, query_span


@triton.jit
def _ordered_bits(x):
    """int32 whose order is the order of the floats, NaN on top; the two zeros are equal."""
    bits = x.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x != x, 0x7FFFFFFF, tl.where(x == 0.0, 0, ordered))


@triton.jit
def _pad(ids, count, width, COLUMNS: tl.constexpr):
    """Fill a list with -1 from ``count`` on; it may be wider than the blocks that this launch looks at."""
    for first in range(0, width, COLUMNS):
        slot = first + tl.arange(0, COLUMNS)
        tl.store(ids + slot, -1, mask=(slot >= count) & (slot < width))


@triton.jit(do_not_specialize=["budget_stride", "q_len", "kv_len", "first_row", "rows", "total_rows", "columns", "width"])
def choose_kernel(
    scores, budgets, indices, counts, cu_q, cu_k, budget_stride, q_len, kv_len, first_row, rows, total_rows, columns, width,
    B: tl.constexpr, SINK: tl.constexpr, LOCAL: tl.constexpr, EXTRA: tl.constexpr, IMPLICIT: tl.constexpr,
    COLUMNS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Write ids and count of row ``first_row + program`` (of each sequence's rows).

    ``budgets[z, block]``: blocks to keep (EXTRA: to keep besides the forced ones). IMPLICIT: rows that keep everything get
    a count and no list.
    """
    row, head, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    _, q_len = query_span(z, cu_q, q_len, RAGGED)
    _, kv_len = key_span(z, cu_k, kv_len, RAGGED)
    block = (kv_len - q_len) // B + first_row + row
    at = (z.to(tl.int64) * tl.num_programs(1) + head) * total_rows + first_row + row
    j = tl.arange(0, COLUMNS)
    if (block * B >= kv_len) | (q_len <= 0):
        tl.store(counts + at, 0)
        _pad(indices + at * width, 0, width, COLUMNS)
        return
    budget = tl.load(budgets + z * budget_stride + block)
    causal = j <= block
    forced = causal & ((j < SINK) | (j > block - LOCAL))
    source = scores + ((z.to(tl.int64) * tl.num_programs(1) + head) * rows + row) * columns
    if budget > block:  # everything
        keep = causal
    else:
        free = causal if EXTRA else causal & ~forced
        wanted = budget if EXTRA else budget - tl.sum(forced.to(tl.int32), 0)
        order = _ordered_bits(tl.load(source + j, mask=free, other=0.0))
        lowest = tl.min(tl.where(free, order, 0x7FFFFFFF), 0)
        span = (tl.max(tl.where(free, order, -0x80000000), 0) - lowest).to(tl.uint32, bitcast=True)
        # Distances from the lowest score are exact without a sign. Blocks that are not free to be chosen lie at 0, where
        # no trial looks.
        key = tl.where(free, order - lowest, 0).to(tl.uint32, bitcast=True)
        threshold = tl.zeros_like(span)
        step, found = tl.full([], 0x80000000, tl.uint32), -1
        while step > span:
            step >>= 1
        while (step > 0) & (found != wanted):
            trial = threshold | step
            found = tl.sum((key >= trial).to(tl.int32), 0)
            threshold = tl.where(found >= wanted, trial, threshold)
            step >>= 1
        above = key > threshold
        level = free & (key == threshold)
        missing = wanted - tl.sum(above.to(tl.int32), 0)
        if missing < tl.sum(level.to(tl.int32), 0):  # a tie at the threshold: the smaller ids
            level = level & (tl.cumsum(level.to(tl.int32), 0) <= missing)
        keep = above | level | forced
    count = tl.sum(keep.to(tl.int32), 0)
    tl.store(counts + at, count)
    if (not IMPLICIT) | (count <= block):
        slot = tl.cumsum(keep.to(tl.int32), 0) - 1
        _pad(indices + at * width, count, width, COLUMNS)
        tl.store(indices + at * width + slot, j, mask=keep & (slot < width))
