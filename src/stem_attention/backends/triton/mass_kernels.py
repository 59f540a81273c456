"""Estimated attention mass: means of short pools of queries and keys, and a softmax over the key pools.

``pool_kernel`` reads Q and K once; tile: one block of one head. Means are rounded to the inputs'
dtype, and variances to bfloat16, whose range they need, so that the products run on the matrix units in one pass.
``keep_kernel``: ``BM`` query pools of one head against all key pools they see, ``BN`` at a time, twice: once for the softmax's
sums, once for the masses, which go straight into lists.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stem_attention.backends.triton.geometry import key_rows, key_span, query_span
from stem_attention.backends.triton.softcap import capped


@triton.jit
def _store_pool(means, variances, at, tile, valid, D: tl.constexpr, BD: tl.constexpr, SPREAD: tl.constexpr):
    """Average a pool's tokens ``(P, BD)``; absent ones, which are zero, count nowhere. SPREAD: their variance too."""
    tile = tile.to(tl.float32)
    count = tl.maximum(tl.sum(valid.to(tl.float32), 0), 1.0)
    mean = tl.sum(tile, 0) / count
    dims = tl.arange(0, BD)
    tl.store(means + at * D + dims, mean.to(means.dtype.element_ty), mask=dims < D)
    if SPREAD:
        away = tl.where(valid[:, None], tile - mean[None, :], 0.0)
        tl.store(variances + at * D + dims, (tl.sum(away * away, 0) / count).to(variances.dtype.element_ty), mask=dims < D)


@triton.jit
def _pool_queries(
    q, means, cu_q, cu_k, stride_b, stride_s, stride_h, q_len, kv_len, first_row, rows, row, head, heads, z,
    B: tl.constexpr, P: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Average the query block ``first_row + row`` of a head in runs of ``P``."""
    q_first, q_len = query_span(z, cu_q, q_len, RAGGED)
    _, kv_len = key_span(z, cu_k, kv_len, RAGGED)
    start = kv_len - q_len
    first = (start // B + first_row + row) * B
    outer = 0 if RAGGED else z.to(tl.int64)
    base = q + outer * stride_b + head.to(tl.int64) * stride_h
    at = ((z.to(tl.int64) * heads + head) * rows + row) * (B // P)
    dims = tl.arange(0, BD)
    for i in range(B // P):
        positions = first + i * P + tl.arange(0, P)
        valid = (positions >= start) & (positions < kv_len)
        tokens = (q_first + positions - start).to(tl.int64)
        tile = tl.load(base + tokens[:, None] * stride_s + dims, mask=valid[:, None] & (dims < D)[None, :], other=0.0)
        _store_pool(means, means, at + i, tile, valid, D, BD, False)


@triton.jit
def _pool_keys(
    k, means, variances, cu_k, page_table, stride_b, stride_s, stride_h, table_stride, pages, kv_len, blocks, block, head,
    heads, z, B: tl.constexpr, P: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, SPREAD: tl.constexpr,
    RAGGED: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Average a key block of a head in runs of ``P``; SPREAD: the variances of each dimension too."""
    k_first, kv_len = key_span(z, cu_k, kv_len, RAGGED)
    at = ((z.to(tl.int64) * heads + head) * blocks + block) * (B // P)
    dims = tl.arange(0, BD)
    for i in range(B // P):
        positions = block * B + i * P + tl.arange(0, P)
        valid = positions < kv_len
        outer, inner = key_rows(z, k_first, positions, valid, page_table, table_stride, pages, PAGE, RAGGED)
        offsets = outer * stride_b + inner * stride_s + head.to(tl.int64) * stride_h
        tile = tl.load(k + offsets[:, None] + dims, mask=valid[:, None] & (dims < D)[None, :], other=0.0)
        _store_pool(means, variances, at + i, tile, valid, D, BD, SPREAD)


@triton.jit(do_not_specialize=["table_stride", "pages", "q_len", "kv_len", "first_row", "rows", "blocks", "heads", "kv_heads"])
def pool_kernel(
    q, q_means, k, k_means, k_variances, cu_q, cu_k, page_table, q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s,
    k_stride_h, table_stride, pages, q_len, kv_len, first_row, rows, blocks, heads, kv_heads,
    B: tl.constexpr, QP: tl.constexpr, KP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, SPREAD: tl.constexpr,
    RAGGED: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Pool ``rows`` query blocks of every head, and behind them, where there are programs left, the key blocks."""
    program, z = tl.program_id(0), tl.program_id(1)
    if program < rows * heads:
        _pool_queries(
            q, q_means, cu_q, cu_k, q_stride_b, q_stride_s, q_stride_h, q_len, kv_len, first_row, rows, program % rows,
            program // rows, heads, z, B, QP, D, BD, RAGGED,
        )  # fmt: skip
    else:
        program -= rows * heads
        _pool_keys(
            k, k_means, k_variances, cu_k, page_table, k_stride_b, k_stride_s, k_stride_h, table_stride, pages, kv_len, blocks,
            program % blocks, program // blocks, kv_heads, z, B, KP, D, BD, SPREAD, RAGGED, PAGE,
        )  # fmt: skip


@triton.jit
def _pools(source, n0, seen, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Rows ``n0`` to ``n0 + BN`` of means or variances; from ``seen`` on the last one before, which nobody looks at."""
    rows = tl.minimum(n0 + tl.arange(0, BN), seen - 1)
    dims = tl.arange(0, BD)
    at = source + rows[:, None] * D + dims
    if D < BD:
        return tl.load(at, mask=(dims < D)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _at_the_edge(logits, n0, last, kv_len, short, KP: tl.constexpr, BN: tl.constexpr):
    """Logits where a pool may begin after a query's ``last`` key, or be the last one and weigh ``short`` less (in base 2)."""
    n = n0 + tl.arange(0, BN)
    logits += tl.where(n == kv_len // KP, short, 0.0)[None, :]
    return tl.where(n[None, :] * KP <= last[:, None], logits, -float("inf"))


@triton.jit
def _add_weights(
    peak, total, queries, k_means, n0, edge, seen, last, kv_len, short, scale, cap,
    KP: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One step of the softmax's sums: the largest logit so far, and the sum of weights relative to it.

    Logits have base 2 and are relative to the weight of a full pool. Before ``edge`` all pools are full and lie in every
    query's past.
    """
    keys = _pools(k_means, n0, seen, BN, D, BD)
    logits = capped(tl.dot(queries, keys.T, input_precision="ieee") * scale, cap)
    if n0 >= edge:
        logits = _at_the_edge(logits, n0, last, kv_len, short, KP, BN)
    higher = tl.maximum(peak, tl.max(logits, 1))
    return higher, total * tl.exp2(peak - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)


@triton.jit
def _below(n):
    """The lowest ``n`` of 32 bits."""
    n = tl.minimum(tl.maximum(n, 0), 32).to(tl.int64)
    return ((1 << n) - 1).to(tl.uint32)


@triton.jit
def _ones(words):
    """How many of 32 bits are set; LLVM knows this idiom."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return ((words * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _list_noticed(
    count, ids, listed, block, whole, least, level, queries, squares, k_means, k_variances, n0, edge, seen, last, kv_len, short,
    scale, spread, cap, width, SINK: tl.constexpr, LOCAL: tl.constexpr, KP: tl.constexpr, per_row: tl.constexpr,
    per_column: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """Append to each row's list the blocks of key pools ``n0`` to ``n0 + BN`` that it keeps; the lists' new lengths.

    A row's blocks become the bits of a word: 32 at most, so that ranks in it are counts of bits.
    """
    rows: tl.constexpr = BM // per_row
    columns: tl.constexpr = BN // per_column
    keys = _pools(k_means, n0, seen, BN, D, BD)
    logits = tl.dot(queries, keys.T, input_precision="ieee") * scale
    if SPREAD:
        variances = _pools(k_variances, n0, seen, BN, D, BD)
        logits += tl.sqrt(tl.dot(squares, variances.T, input_precision="ieee")) * spread
    logits = capped(logits, cap) - level[:, None]
    if n0 >= edge:
        logits = _at_the_edge(logits, n0, last, kv_len, short, KP, BN)
    weights = tl.sum(tl.reshape(tl.exp2(logits), [BM, columns, per_column]), 2)
    column = tl.arange(0, columns)
    bits = tl.full([columns], 1, tl.uint32) << column.to(tl.uint32)
    # NaN is not less, and so is noticed: what dense attention would poison stays visible.
    noticed = tl.sum(tl.where(weights < least[:, None], tl.zeros_like(bits)[None, :], bits[None, :]), 1)
    noticed = tl.reduce_or(tl.reshape(noticed.to(tl.uint32), [rows, per_row]), 1)
    j0 = n0 // per_column
    local = _below(block - LOCAL + 1 - j0) ^ 0xFFFFFFFF
    keep = noticed | _below(SINK - j0) | local | tl.where(whole, 0xFFFFFFFF, 0).to(tl.uint32)
    keep &= _below(tl.minimum(block + 1 - j0, columns))
    slot = count[:, None] + _ones(keep[:, None] & (bits - 1)[None, :])
    kept = (keep[:, None] & bits[None, :]) != 0
    tl.store(ids[:, None] + slot, tl.zeros_like(slot) + (j0 + column)[None, :], mask=kept & listed[:, None] & (slot < width))
    return count + _ones(keep)


@triton.jit(do_not_specialize=["prompts", "q_len", "kv_len", "first_row", "rows", "total_rows", "blocks", "width"])
def keep_kernel(
    q_means, k_means, k_variances, indices, counts, prompts, cu_q, cu_k, q_len, kv_len, first_row, rows, total_rows,
    blocks, width, share, head_shares, kept, scale, spread, cap, B: tl.constexpr, QP: tl.constexpr, KP: tl.constexpr,
    G: tl.constexpr, SINK: tl.constexpr, LOCAL: tl.constexpr, TAIL: tl.constexpr, IMPLICIT: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, SPREAD: tl.constexpr, RAGGED: tl.constexpr, ONE_LENGTH: tl.constexpr,
):  # fmt: skip
    """Write ids and counts of rows ``first_row`` to ``first_row + rows`` (of each sequence's rows).

    ``prompts[z]``: blocks of the whole prompt, 0 for one that keeps everything; ONE_LENGTH: the number itself, for all.
    ``head_shares[head]``, unless None, stands for ``share``. ``kept``, unless None, grows by the blocks that are kept.
    ``scale`` is the softmax scale times log2(e), ``spread`` its size times the config's, without SPREAD 0, and ``cap`` the
    soft cap times log2(e) or None. IMPLICIT: rows known to keep everything get a count and no list, and lists end without
    padding.
    """
    per_row: tl.constexpr = B // QP
    per_column: tl.constexpr = B // KP
    tile_rows: tl.constexpr = BM // per_row
    # The last rows see the most keys: they begin first.
    row0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * tile_rows
    head, z = tl.program_id(1), tl.program_id(2)
    _, q_len = query_span(z, cu_q, q_len, RAGGED)
    _, kv_len = key_span(z, cu_k, kv_len, RAGGED)
    start = kv_len - q_len
    block0 = start // B + first_row + row0
    row = row0 + tl.arange(0, tile_rows)
    block = block0 + tl.arange(0, tile_rows)
    exists = (row < rows) & (block * B < kv_len) & (q_len > 0)
    prompt = prompts if ONE_LENGTH else tl.load(prompts + z)
    whole = block >= prompt - TAIL
    heads = tl.num_programs(1)
    at = z.to(tl.int64) * heads + head

    if head_shares is not None:
        share = tl.load(head_shares + head)
    m = tl.arange(0, BM)
    first = block0 * B + m * QP
    last = tl.minimum(first + QP, kv_len) - 1
    # A pool without queries of this call notices nothing.
    least = tl.where((first + QP > start) & (first < kv_len), share / tl.maximum(prompt, 1), float("inf"))
    dims = tl.arange(0, BD)
    source = q_means + (at * (rows * per_row) + row0 * per_row + m)[:, None] * D + dims
    queries = tl.load(source, mask=(row0 * per_row + m < rows * per_row)[:, None] & (dims < D)[None, :], other=0.0)
    keys = (z.to(tl.int64) * (heads // G) + head // G) * blocks * per_column * D
    k_means += keys
    k_variances += keys
    squares = queries.to(tl.float32) * queries.to(tl.float32)
    squares = squares.to(k_variances.dtype.element_ty)
    seen = tl.minimum((block0 + tile_rows) * per_column, tl.cdiv(kv_len, KP))
    seen = tl.where((block0 * B < kv_len) & (q_len > 0), seen, 0)
    edge = tl.minimum(block0 * per_column, seen) // BN * BN
    rest = kv_len % KP
    short = tl.log2(tl.where(rest > 0, rest, KP).to(tl.float32) / KP)

    peak = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for n0 in range(0, seen, BN):
        peak, total = _add_weights(
            peak, total, queries, k_means, n0, edge, seen, last, kv_len, short, scale, cap, KP, BN, D, BD
        )  # fmt: skip
    level = peak + tl.log2(total)

    ids = indices + (at * total_rows + first_row + row) * width
    listed = exists & (whole == 0) if IMPLICIT else exists
    count = tl.zeros([tile_rows], tl.int32)
    for n0 in range(0, seen, BN):
        count = _list_noticed(
            count, ids, listed, block, whole, least, level, queries, squares, k_means, k_variances, n0, edge, seen, last,
            kv_len, short, scale, spread, cap, width, SINK, LOCAL, KP, per_row, per_column, BM, BN, D, BD, SPREAD,
        )  # fmt: skip
    count = tl.where(exists, count, 0)
    tl.store(counts + at * total_rows + first_row + row, count, mask=row < rows)
    if kept is not None:
        tl.atomic_add(kept, tl.sum(count.to(tl.int64)), sem="relaxed")
    if not IMPLICIT:
        for first_slot in range(0, width, BN):
            slot = first_slot + tl.arange(0, BN)[None, :]
            tl.store(ids[:, None] + slot, -1, mask=(row < rows)[:, None] & (slot >= count[:, None]) & (slot < width))
