"""Estimated attention mass: means of short pools of queries and keys, and a softmax over the key pools.

``pool_query_means`` and ``pool_key_means`` read Q and K once; tile: one block of one head. Means are rounded to the inputs'
dtype, so the estimate's product runs on the matrix units in one pass. ``mass_kernel``: ``BM`` query pools of one head against
all key pools they see, ``BN`` at a time, twice: once for the softmax's sums, once for the masses.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stem_attention.backends.triton.geometry import key_rows, key_span, query_span


@triton.jit
def _store_means(means, at, tile, valid, B: tl.constexpr, P: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Average a block's tokens ``(B, BD)`` in runs of ``P``; absent ones count nowhere."""
    sums = tl.sum(tl.reshape(tile.to(tl.float32), [B // P, P, BD]), 1)
    count = tl.sum(tl.reshape(valid.to(tl.int32), [B // P, P]), 1)
    mean = sums / tl.maximum(count, 1).to(tl.float32)[:, None]
    dims = tl.arange(0, BD)
    target = means + (at * (B // P) + tl.arange(0, B // P))[:, None] * D + dims
    tl.store(target, mean.to(means.dtype.element_ty), mask=(dims < D)[None, :])


@triton.jit(do_not_specialize=["q_len", "kv_len", "first_row", "rows"])
def pool_query_means(
    q, means, cu_q, cu_k, stride_b, stride_s, stride_h, q_len, kv_len, first_row, rows,
    B: tl.constexpr, P: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Average the query block ``first_row + program`` of every head in runs of ``P``."""
    row, head, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q_first, q_len = query_span(z, cu_q, q_len, RAGGED)
    _, kv_len = key_span(z, cu_k, kv_len, RAGGED)
    start = kv_len - q_len
    positions = (start // B + first_row + row) * B + tl.arange(0, B)
    valid = (positions >= start) & (positions < kv_len)
    tokens = (q_first + positions - start).to(tl.int64)
    outer = 0 if RAGGED else z.to(tl.int64)
    base = q + outer * stride_b + head.to(tl.int64) * stride_h
    dims = tl.arange(0, BD)
    tile = tl.load(base + tokens[:, None] * stride_s + dims, mask=valid[:, None] & (dims < D)[None, :], other=0.0)
    _store_means(means, (z.to(tl.int64) * tl.num_programs(1) + head) * rows + row, tile, valid, B, P, D, BD)


@triton.jit(do_not_specialize=["table_stride", "pages", "kv_len", "blocks"])
def pool_key_means(
    k, means, cu_k, page_table, stride_b, stride_s, stride_h, table_stride, pages, kv_len, blocks,
    B: tl.constexpr, P: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, RAGGED: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Average a key block of every head in runs of ``P``."""
    block, head, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    k_first, kv_len = key_span(z, cu_k, kv_len, RAGGED)
    positions = block * B + tl.arange(0, B)
    valid = positions < kv_len
    outer, inner = key_rows(z, k_first, positions, valid, page_table, table_stride, pages, PAGE, RAGGED)
    dims = tl.arange(0, BD)
    offsets = outer * stride_b + inner * stride_s + head.to(tl.int64) * stride_h
    tile = tl.load(k + offsets[:, None] + dims, mask=valid[:, None] & (dims < D)[None, :], other=0.0)
    _store_means(means, (z.to(tl.int64) * tl.num_programs(1) + head) * blocks + block, tile, valid, B, P, D, BD)


@triton.jit
def _logits(
    queries, k_means, n, pools, last, kv_len, scale,
    KP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Base-2 logits of query pools against key pools ``n``, each key pool with the weight of its keys."""
    dims = tl.arange(0, BD)
    keys = tl.load(k_means + n[:, None] * D + dims, mask=(n < pools)[:, None] & (dims < D)[None, :], other=0.0)
    product = tl.dot(queries, keys.T, input_precision="ieee")
    count = tl.minimum(tl.maximum(kv_len - n * KP, 1), KP)
    logits = product * scale + tl.log2(count.to(tl.float32))[None, :]
    return tl.where(n[None, :] * KP <= last[:, None], logits, -float("inf"))


@triton.jit(do_not_specialize=["q_len", "kv_len", "first_row", "rows", "blocks", "columns"])
def mass_kernel(
    q_means, k_means, scores, cu_q, cu_k, q_len, kv_len, first_row, rows, blocks, columns, scale,
    B: tl.constexpr, QP: tl.constexpr, KP: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Write ``scores[z, head, row, column]``, float32, for columns up to the diagonal: the most that a query pool gives.

    ``scale`` is the softmax scale times log2(e). A NaN becomes +inf, which is kept.
    """
    per_row: tl.constexpr = B // QP
    per_column: tl.constexpr = B // KP
    tile_rows: tl.constexpr = BM // per_row
    tile_columns: tl.constexpr = BN // per_column
    # The last rows see the most keys: they begin first.
    row0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * tile_rows
    head, z = tl.program_id(1), tl.program_id(2)
    _, q_len = query_span(z, cu_q, q_len, RAGGED)
    _, kv_len = key_span(z, cu_k, kv_len, RAGGED)
    start = kv_len - q_len
    block0 = start // B + first_row + row0
    if (block0 * B >= kv_len) | (q_len <= 0):
        return
    heads = tl.num_programs(1)
    at = (z.to(tl.int64) * heads + head) * rows
    m = tl.arange(0, BM)
    first = block0 * B + m * QP
    present = (first + QP > start) & (first < kv_len)
    last = tl.minimum(first + QP, kv_len) - 1
    dims = tl.arange(0, BD)
    source = q_means + ((at + row0) * per_row + m)[:, None] * D + dims
    queries = tl.load(source, mask=(row0 * per_row + m < rows * per_row)[:, None] & (dims < D)[None, :], other=0.0)
    k_means += (z.to(tl.int64) * (heads // G) + head // G) * blocks * per_column * D
    pools = blocks * per_column
    seen = tl.minimum((block0 + tile_rows) * per_column, pools)
    peak = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for n0 in range(0, seen, BN):
        logits = _logits(queries, k_means, n0 + tl.arange(0, BN), pools, last, kv_len, scale, KP, D, BD)
        higher = tl.maximum(peak, tl.max(logits, 1))
        total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
        peak = higher
    level = peak + tl.log2(total)
    block = block0 + tl.arange(0, tile_rows)
    target = scores + (at + row0 + tl.arange(0, tile_rows))[:, None] * columns
    for n0 in range(0, seen, BN):
        logits = _logits(queries, k_means, n0 + tl.arange(0, BN), pools, last, kv_len, scale, KP, D, BD)
        weights = tl.sum(tl.reshape(tl.exp2(logits - level[:, None]), [BM, tile_columns, per_column]), 2)
        weights = tl.where(weights != weights, float("inf"), weights)
        weights = tl.where(present[:, None], weights, 0.0)
        mass = tl.max(tl.reshape(weights, [tile_rows, per_row, tile_columns]), 1)
        column = n0 // per_column + tl.arange(0, tile_columns)
        inside = (row0 + tl.arange(0, tile_rows) < rows)[:, None] & (column[None, :] <= block[:, None])
        tl.store(target + column[None, :], mass, mask=inside & (column < columns)[None, :])
