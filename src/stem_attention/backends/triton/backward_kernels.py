"""The gradient of block-sparse attention, portable Triton: for queries by the rows' lists, for keys and values by the columns'.

No program adds to what another one writes, so every run gives the same bits. ``dq_kernel`` has one program per query block and
head. ``dkv_kernel`` has one per chunk of a key block's list, for all query heads that share it: a key block that most rows
keep, such as the first, is several chunks, whose sums ``sum_kernel`` adds in their order. Weights are ``exp(scores - lse)``, in
base 2, so that they hold whatever else the log-sum-exp counts. ``factor`` and ``steepness`` are those of
:func:`attention.in_base_two`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stem_attention.backends.triton.geometry import key_span, query_span
from stem_attention.backends.triton.softcap import tanh

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(x, stride_s, rows, valid, D: tl.constexpr, BD: tl.constexpr):
    """``(len(rows), BD)``, zeros where a row is not valid and behind the last dimension."""
    dims = tl.arange(0, BD)
    return tl.load(x + rows.to(tl.int64)[:, None] * stride_s + dims, mask=valid[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def _copied(x, z, head, position, TILE: tl.constexpr, BD: tl.constexpr):
    """The same by the copy engine, which writes zeros for what lies outside; for rectangular batches."""
    return tl.reshape(x.load([z, position, head, 0]), (TILE, BD))


@triton.jit(do_not_specialize=["tokens", "lse_stride_b", "lse_stride_h"])
def delta_kernel(
    out, d_out, d_lse, delta, o_stride_b, o_stride_s, o_stride_h, do_stride_b, do_stride_s, do_stride_h, lse_stride_b,
    lse_stride_h, delta_stride_b, delta_stride_h, tokens, TILE: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """``delta = sum(out * d_out) - d_lse`` of ``TILE`` tokens of one head."""
    tile, head, z = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    token = tile * TILE + tl.arange(0, TILE)
    valid = token < tokens
    o = _tile(out + z * o_stride_b + head * o_stride_h, o_stride_s, token, valid, DV, BDV)
    do = _tile(d_out + z * do_stride_b + head * do_stride_h, do_stride_s, token, valid, DV, BDV)
    less = tl.load(d_lse + z * lse_stride_b + head * lse_stride_h + token, mask=valid, other=0.0)
    sums = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + z * delta_stride_b + head * delta_stride_h + token, sums - less, mask=valid)


@triton.jit(do_not_specialize=["q_len", "kv_len", "rows", "heavy", "lse_stride_b", "lse_stride_h"])
def dq_kernel(
    q, k, v, k_tiles, v_tiles, d_out, lse, delta, d_q, lists, starts, cu_q, cu_k,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h,
    do_stride_b, do_stride_s, do_stride_h, dq_stride_b, dq_stride_s, dq_stride_h, lse_stride_b, lse_stride_h, delta_stride_b,
    delta_stride_h, q_len, kv_len, heads, rows, heavy, scale, factor, steepness,
    G: tl.constexpr, B: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr,
    BDV: tl.constexpr, RAGGED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Gradient of ``BM`` queries of one block and head: ``scale * dS K`` over the key blocks that the block keeps."""
    pid, z, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # Rows that keep everything are at the end, if there are any: the last ones of all heads start first.
    if pid < heavy * heads:
        head, from_end = pid % heads, pid // heads
    else:
        rest = pid - heavy * heads
        head, from_end = rest // (rows - heavy), heavy + rest % (rows - heavy)
    q_first, q_len = query_span(z, cu_q, q_len, RAGGED)
    k_first, kv_len = key_span(z, cu_k, kv_len, RAGGED)
    start = kv_len - q_len
    block = (kv_len - 1) // B - from_end
    row = block - start // B
    if (row < 0) | (q_len <= 0):
        return
    outer = z.to(tl.int64) * (0 if RAGGED else 1)
    wide_head, kv_head = head.to(tl.int64), head // G
    positions = block * B + part * BM + tl.arange(0, BM)
    present = (positions >= start) & (positions < kv_len)
    tokens = q_first + positions - start
    q_tile = _tile(q + outer * q_stride_b + wide_head * q_stride_h, q_stride_s, tokens, present, D, BD)  # [BM, BD]
    do_tile = _tile(d_out + outer * do_stride_b + wide_head * do_stride_h, do_stride_s, tokens, present, DV, BDV)  # [BM, BDV]
    # A row that is not there has infinite lse, so weights of 0.
    norm = tl.load(lse + outer * lse_stride_b + wide_head * lse_stride_h + tokens, mask=present, other=float("inf")) * LOG2E
    shift = tl.load(delta + outer * delta_stride_b + wide_head * delta_stride_h + tokens, mask=present, other=0.0)
    keys = k + outer * k_stride_b + kv_head.to(tl.int64) * k_stride_h
    values = v + outer * v_stride_b + kv_head.to(tl.int64) * v_stride_h
    at = (z.to(tl.int64) * heads + head) * rows + row
    first = tl.load(starts + at)
    count = tl.load(starts + at + 1) - first
    gradient = tl.zeros([BM, BD], tl.float32)
    SUB: tl.constexpr = B // BN
    for t in range(0, count * SUB):
        kept = tl.load(lists + first + t // SUB)
        position = kept * B + (t % SUB) * BN
        columns = position + tl.arange(0, BN)
        if TMA:
            k_tile = _copied(k_tiles, z, kv_head, position, BN, BD)
            v_tile = _copied(v_tiles, z, kv_head, position, BN, BDV)
        else:
            k_tile = _tile(keys, k_stride_s, k_first + columns, columns < kv_len, D, BD)  # [BN, BD]
            v_tile = _tile(values, v_stride_s, k_first + columns, columns < kv_len, DV, BDV)
        scores = tl.dot(q_tile, k_tile.T)  # [BM, BN]
        if steepness is not None:
            bounded = tanh(scores * steepness)
            scores = bounded
        scores = scores * factor - norm[:, None]
        if kept == block:
            scores = tl.where(positions[:, None] >= columns[None, :], scores, -float("inf"))
        weights = tl.math.exp2(scores)
        if steepness is not None:
            weights *= 1.0 - bounded * bounded
        d_scores = weights * (tl.dot(do_tile, v_tile.T) - shift[:, None])
        gradient = tl.dot(d_scores.to(k_tile.dtype), k_tile, gradient)
    dims = tl.arange(0, BD)
    target = d_q + outer * dq_stride_b + wide_head * dq_stride_h + tokens.to(tl.int64)[:, None] * dq_stride_s + dims
    tl.store(target, (gradient * scale).to(d_q.dtype.element_ty), mask=present[:, None] & (dims < D)[None, :])


@triton.jit(do_not_specialize=["q_len", "kv_len", "rows", "blocks", "columns", "lse_stride_b", "lse_stride_h"])
def dkv_kernel(
    q, k, v, q_tiles, do_tiles, d_out, lse, delta, d_k, d_v, sums_k, sums_v, lists, starts, owners, firsts, slots, longest,
    cu_q, cu_k,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h,
    do_stride_b, do_stride_s, do_stride_h, dk_stride_b, dk_stride_s, dk_stride_h, dv_stride_b, dv_stride_s, dv_stride_h,
    lse_stride_b, lse_stride_h, delta_stride_b, delta_stride_h, q_len, kv_len, kv_heads, rows, blocks, columns, scale,
    factor, steepness,
    G: tl.constexpr, B: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr,
    BDV: tl.constexpr, RAGGED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Gradients of ``BK`` keys and values of one block, over one chunk of the rows that keep it; scores are transposed."""
    chunk, part = tl.program_id(0), tl.program_id(1)
    column = tl.load(owners + chunk)
    if column >= columns:  # as many programs start as there could be chunks
        return
    number = chunk - tl.load(firsts + column)
    most = tl.load(longest)
    begin = tl.load(starts + column.to(tl.int64) * G) + number * most
    count = tl.minimum(tl.load(starts + (column.to(tl.int64) + 1) * G) - begin, most)
    z, kv_head, block = column // (kv_heads * blocks), column // blocks % kv_heads, column % blocks
    q_first, q_len = query_span(z, cu_q, q_len, RAGGED)
    k_first, kv_len = key_span(z, cu_k, kv_len, RAGGED)
    start = kv_len - q_len
    outer = z.to(tl.int64) * (0 if RAGGED else 1)
    wide_head = kv_head.to(tl.int64)
    places = block * B + part * BK + tl.arange(0, BK)
    present = places < kv_len
    k_tile = _tile(k + outer * k_stride_b + wide_head * k_stride_h, k_stride_s, k_first + places, present, D, BD)  # [BK, BD]
    v_tile = _tile(v + outer * v_stride_b + wide_head * v_stride_h, v_stride_s, k_first + places, present, DV, BDV)
    sum_k = tl.zeros([BK, BD], tl.float32)
    sum_v = tl.zeros([BK, BDV], tl.float32)
    SUB: tl.constexpr = B // BM
    entry = tl.load(lists + begin, mask=count > 0, other=0)
    for t in range(0, count * SUB):
        following = tl.load(lists + begin + tl.minimum((t + 1) // SUB, count - 1))  # in time for the next step's tiles
        head, row = kv_head * G + entry // rows, start // B + entry % rows
        position = row * B + (t % SUB) * BM
        positions = position + tl.arange(0, BM)
        there = (positions >= start) & (positions < kv_len)
        tokens = q_first + positions - start
        wide = head.to(tl.int64)
        if TMA:
            q_tile = _copied(q_tiles, z, head, position - start, BM, BD)
            do_tile = _copied(do_tiles, z, head, position - start, BM, BDV)
        else:
            q_tile = _tile(q + outer * q_stride_b + wide * q_stride_h, q_stride_s, tokens, there, D, BD)  # [BM, BD]
            do_tile = _tile(d_out + outer * do_stride_b + wide * do_stride_h, do_stride_s, tokens, there, DV, BDV)
        norm = tl.load(lse + outer * lse_stride_b + wide * lse_stride_h + tokens, mask=there, other=float("inf")) * LOG2E
        shift = tl.load(delta + outer * delta_stride_b + wide * delta_stride_h + tokens, mask=there, other=0.0)
        scores = tl.dot(k_tile, q_tile.T)  # [BK, BM]
        if steepness is not None:
            bounded = tanh(scores * steepness)
            scores = bounded
        scores = scores * factor - norm[None, :]
        if row == block:
            scores = tl.where(positions[None, :] >= places[:, None], scores, -float("inf"))
        weights = tl.math.exp2(scores)
        held = weights.to(do_tile.dtype)
        if steepness is not None:
            weights *= 1.0 - bounded * bounded
        sum_v = tl.dot(held, do_tile, sum_v)
        d_scores = weights * (tl.dot(v_tile, do_tile.T) - shift[None, :])
        sum_k = tl.dot(d_scores.to(q_tile.dtype), q_tile, sum_k)
        entry = following
    sum_k = sum_k * scale
    dims, v_dims = tl.arange(0, BD), tl.arange(0, BDV)
    slot = tl.load(slots + column)
    if slot < 0:
        tokens = (k_first + places).to(tl.int64)[:, None]
        own_k = d_k + outer * dk_stride_b + wide_head * dk_stride_h + tokens * dk_stride_s + dims
        own_v = d_v + outer * dv_stride_b + wide_head * dv_stride_h + tokens * dv_stride_s + v_dims
        tl.store(own_k, sum_k.to(d_k.dtype.element_ty), mask=present[:, None] & (dims < D)[None, :])
        tl.store(own_v, sum_v.to(d_v.dtype.element_ty), mask=present[:, None] & (v_dims < DV)[None, :])
    else:
        lines = ((slot + number).to(tl.int64) * B + part * BK + tl.arange(0, BK))[:, None]
        tl.store(sums_k + lines * BD + dims, sum_k)
        tl.store(sums_v + lines * BDV + v_dims, sum_v)


@triton.jit(do_not_specialize=["kv_len", "blocks"])
def sum_kernel(
    sums_k, sums_v, d_k, d_v, chunks, slots, cu_k, dk_stride_b, dk_stride_s, dk_stride_h, dv_stride_b, dv_stride_s, dv_stride_h,
    kv_len, kv_heads, blocks,
    B: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
    RAGGED: tl.constexpr,
):  # fmt: skip
    """Add the chunks of a key block that has several, first to last, for ``TILE`` of its keys."""
    column, part = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + column)
    if slot < 0:
        return
    z, kv_head, block = column // (kv_heads * blocks), column // blocks % kv_heads, column % blocks
    k_first, kv_len = key_span(z, cu_k, kv_len, RAGGED)
    outer = z.to(tl.int64) * (0 if RAGGED else 1)
    lines = part * TILE + tl.arange(0, TILE)
    dims, v_dims = tl.arange(0, BD), tl.arange(0, BDV)
    sum_k = tl.zeros([TILE, BD], tl.float32)
    sum_v = tl.zeros([TILE, BDV], tl.float32)
    for i in range(0, tl.load(chunks + column)):
        line = ((slot + i).to(tl.int64) * B + lines)[:, None]
        sum_k += tl.load(sums_k + line * BD + dims)
        sum_v += tl.load(sums_v + line * BDV + v_dims)
    places = block * B + lines
    present = (places < kv_len)[:, None]
    tokens, wide_head = (k_first + places).to(tl.int64)[:, None], kv_head.to(tl.int64)
    own_k = d_k + outer * dk_stride_b + wide_head * dk_stride_h + tokens * dk_stride_s + dims
    own_v = d_v + outer * dv_stride_b + wide_head * dv_stride_h + tokens * dv_stride_s + v_dims
    tl.store(own_k, sum_k.to(d_k.dtype.element_ty), mask=present & (dims < D)[None, :])
    tl.store(own_v, sum_v.to(d_v.dtype.element_ty), mask=present & (v_dims < DV)[None, :])
