"""One read of Q, K and V: group sums per block for the routing score, largest value norm per block.

Tile: one block of one head. The sums are fp32; they are stored as two bf16 numbers (high part and remainder, 16 bits of
mantissa together) so that the score's product runs on the matrix units at nearly fp32 precision.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stem_attention.backends.triton.geometry import key_rows, key_span, query_span


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
    B: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, SPLIT: tl.constexpr, RAGGED: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    """Sum the keys of a block into ``S`` groups, and take the largest value norm.

    ``NORMS = 1``: write ``beta * max(0, ln norm)`` of the block; else write the plain norms of its ``NORMS`` equal parts.
    """
    block, head, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    k_first, kv_len = key_span(z, cu_k, kv_len, RAGGED)
    dims = tl.arange(0, BD)
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
            v + (outer * v_stride_b + inner * v_stride_s + head64 * v_stride_h)[:, None] + dims, mask=mask, other=0.0
        )
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
