"""Stem's selection in four kernels: group sums of queries and of keys, scores of block pairs, and the best of each row.

``pool_queries`` and ``pool_keys`` read Q, K and V once; tile: one block of one head. Group sums are fp32, stored as two bf16
numbers (high part and remainder, 16 bits of mantissa together) so that the score's product runs on the matrix units, in three
products, at nearly fp32 precision.
``score_kernel``: ``BM`` query blocks by ``BN`` key blocks of one query head, one product of inner length stride * head_dim,
plus the value term; tiles after the diagonal are skipped.
``choose_kernel``: the exact k-th largest score of one row by bisection over ordered bits, then an ascending list; the whole row
in registers. The threshold is found bit by bit from the first bit in which the row's scores differ (at most 32 counts), so the
result is exact and deterministic; blocks that tie with it are taken from the smallest id on. NaN ranks above everything.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stem_attention.backends.triton.geometry import key_rows, key_span, query_span
from stem_attention.backends.triton.softcap import capped


@triton.jit
def _store_sums(high, low, at, sums, width, SPLIT: tl.constexpr, BD: tl.constexpr, D: tl.constexpr, S: tl.constexpr):
    groups = tl.arange(0, S)
    dims = tl.arange(0, BD)
    offsets = at * width + groups[:, None] * D + dims
    if SPLIT:
        upper = sums.to(tl.bfloat16)
        tl.store(high + offsets, upper, mask=dims[None, :] < D)
        tl.store(low + offsets, (sums - upper.to(tl.float32)).to(tl.bfloat16), mask=dims[None, :] < D)
    else:
        tl.store(high + offsets, sums, mask=dims[None, :] < D)


# Lengths differ from call to call: no kernel of its own for one that is 1 or a multiple of 16.
@triton.jit(do_not_specialize=["q_len", "kv_len", "first_row", "rows"])
def pool_queries(
    q, high, low, cu_q, cu_k, stride_b, stride_s, stride_h, q_len, kv_len, first_row, rows,
    B: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, SPLIT: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Sum block ``first_row + program`` of every head into ``S`` groups, in reversed group order (the antidiagonal)."""
    row, head, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q_first, q_len = query_span(z, cu_q, q_len, RAGGED)
    _, kv_len = key_span(z, cu_k, kv_len, RAGGED)
    start = kv_len - q_len
    block = start // B + first_row + row
    outer = 0 if RAGGED else z.to(tl.int64)
    base = q + outer * stride_b + head.to(tl.int64) * stride_h
    dims = tl.arange(0, BD)
    offsets = S - 1 - tl.arange(0, S)
    sums = tl.zeros([S, BD], tl.float32)
    for a in tl.static_range(B // S):
        positions = block * B + a * S + offsets
        valid = (positions >= start) & (positions < kv_len)
        tokens = (q_first + positions - start).to(tl.int64)
        tile = tl.load(base + tokens[:, None] * stride_s + dims, mask=valid[:, None] & (dims < D)[None, :], other=0.0)
        sums += tile.to(tl.float32)
    at = (z.to(tl.int64) * tl.num_programs(1) + head) * rows + row
    _store_sums(high, low, at, sums, S * D, SPLIT, BD, D, S)


@triton.jit(do_not_specialize=["table_stride", "pages", "kv_len", "blocks"])
def pool_keys(
    k, v, high, low, value, cu_k, page_table, k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h,
    table_stride, pages, kv_len, blocks, beta, NORMS: tl.constexpr,
    B: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
    SPLIT: tl.constexpr, RAGGED: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Sum the keys of a block into ``S`` groups, and take the largest value norm.

    ``NORMS = 1``: write ``beta * max(0, ln norm)`` of the block; else write the plain norms of its ``NORMS`` equal parts.
    """
    block, head, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    k_first, kv_len = key_span(z, cu_k, kv_len, RAGGED)
    dims, value_dims = tl.arange(0, BD), tl.arange(0, BDV)
    at = (z.to(tl.int64) * tl.num_programs(1) + head) * blocks + block
    sums = tl.zeros([S, BD], tl.float32)
    peak = tl.full([S], 0.0, tl.float32)
    poison = tl.full([S], 0.0, tl.float32)
    for a in tl.static_range(B // S):
        positions = block * B + a * S + tl.arange(0, S)
        valid = positions < kv_len
        outer, inner = key_rows(z, k_first, positions, valid, page_table, table_stride, pages, PAGE, RAGGED)
        mask = valid[:, None] & (dims < D)[None, :]
        head64 = head.to(tl.int64)
        k_tile = tl.load(
            k + (outer * k_stride_b + inner * k_stride_s + head64 * k_stride_h)[:, None] + dims, mask=mask, other=0.0
        )
        sums += k_tile.to(tl.float32)
        v_tile = tl.load(
            v + (outer * v_stride_b + inner * v_stride_s + head64 * v_stride_h)[:, None] + value_dims,
            mask=valid[:, None] & (value_dims < DV)[None, :], other=0.0,
        )  # fmt: skip
        v_tile = v_tile.to(tl.float32)
        square = tl.sum(v_tile * v_tile, 1)
        peak = tl.maximum(peak, square)
        poison += tl.where(square != square, square, 0.0)  # the maximum drops NaN, but dense attention would show it
        if NORMS > 1:
            part = tl.max(peak, 0) + tl.sum(poison, 0)
            tl.store(value + at * NORMS + a, tl.sqrt(part))
            peak = tl.full([S], 0.0, tl.float32)
            poison = tl.full([S], 0.0, tl.float32)
    if NORMS == 1:
        square = tl.max(peak, 0)
        log = tl.where(square > 1.0, 0.5 * tl.log(square), 0.0)
        tl.store(value + at, beta * (log + tl.sum(poison, 0)))
    _store_sums(high, low, at, sums, S * D, SPLIT, BD, D, S)


@triton.jit
def _tile(base, rows, limit, inner, WIDTH: tl.constexpr, BK: tl.constexpr):
    at = inner + tl.arange(0, BK)
    mask = (rows < limit)[:, None]
    if WIDTH % BK:
        mask = mask & (at < WIDTH)[None, :]
    return tl.load(base + rows[:, None] * WIDTH + at, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["q_len", "kv_len", "first_row", "rows", "blocks"])
def score_kernel(
    q_high, q_low, k_high, k_low, value, scores, cu_q, cu_k, q_len, kv_len, first_row, rows, blocks, columns, scale, cap,
    B: tl.constexpr, R: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    WIDTH: tl.constexpr, SPLIT: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Write ``scores[z, head, row, column]``, float32, for columns up to the diagonal; others are left as they are.

    ``first_row`` counts from each sequence's first query block; ``rows`` are scored in this launch. ``value`` is
    ``beta * magnitude (z, kv_head, blocks)``, ``cap`` the soft cap of the routing score or None.
    """
    row_tiles = tl.cdiv(rows, BM)
    tile, head, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row0, column0 = (tile % row_tiles) * BM, (tile // row_tiles) * BN
    _, q_len = query_span(z, cu_q, q_len, RAGGED)
    _, kv_len = key_span(z, cu_k, kv_len, RAGGED)
    start = kv_len - q_len
    block0 = start // B + first_row + row0
    if (column0 > block0 + BM - 1) | (block0 * B >= kv_len) | (q_len <= 0):
        return
    heads = tl.num_programs(1)
    at_q = (z.to(tl.int64) * heads + head) * rows
    at_k = (z.to(tl.int64) * (heads // G) + head // G) * blocks
    m = row0 + tl.arange(0, BM)
    n = column0 + tl.arange(0, BN)
    acc = tl.zeros([BM, BN], tl.float32)
    for inner in range(0, WIDTH, BK):
        qh = _tile(q_high + at_q * WIDTH, m, rows, inner, WIDTH, BK)
        kh = _tile(k_high + at_k * WIDTH, n, blocks, inner, WIDTH, BK)
        if SPLIT:
            ql = _tile(q_low + at_q * WIDTH, m, rows, inner, WIDTH, BK)
            kl = _tile(k_low + at_k * WIDTH, n, blocks, inner, WIDTH, BK)
            acc = tl.dot(ql, kh.T, acc)
            acc = tl.dot(qh, kl.T, acc)
            acc = tl.dot(qh, kh.T, acc)
        else:
            acc = tl.dot(qh, kh.T, acc, input_precision="ieee")
    block = block0 + tl.arange(0, BM)
    present = tl.minimum((block + 1) * B, kv_len) - tl.maximum(block * B, start)
    acc = acc * (scale / (tl.maximum(present, 1) * R).to(tl.float32))[:, None]
    acc = capped(acc, cap)
    acc += tl.load(value + at_k + n, mask=n < blocks, other=0.0)[None, :]
    target = scores + (at_q + m)[:, None] * columns + n[None, :]
    tl.store(target, acc, mask=(m < rows)[:, None] & (n[None, :] <= block[:, None]) & (n < columns)[None, :])


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
