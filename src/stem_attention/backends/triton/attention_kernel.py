"""Block-sparse attention forward, portable Triton: one program per query block and head.

Tile: the whole query block against ``BN`` keys. Only the diagonal block, the last of its list, is masked. Online softmax
in base 2 with the scale folded in, fp32 accumulation. Keys and values come by tensor descriptors (TMA) where card and
strides allow, else through pointers. Long rows start first. A head's sink, a score without a value, joins the sum at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stem_attention.backends.triton.geometry import key_rows, key_span, query_span
from stem_attention.backends.triton.softcap import tanh


@triton.jit
def _copied_tile(
    x, z, head, first, position, kv_len, page_table, table_stride, pages,
    BN: tl.constexpr, BD: tl.constexpr, PAGE: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Keys or values ``[position, position + BN)`` of one kv head by the copy engine, ``(BN, BD)``.

    After a sequence's last key come zeros in a rectangular batch, in others whatever lies there.
    """
    if PAGE:
        # A block's later tiles may begin after the last key, where the table may end.
        page = tl.load(page_table + z.to(tl.int64) * table_stride + position // PAGE, mask=position < kv_len, other=0)
        page = tl.minimum(tl.maximum(page, 0), pages - 1)
        tile = x.load([page, position % PAGE, head, 0])
    elif RAGGED:
        tile = x.load([0, first + position, head, 0])
    else:
        tile = x.load([z, position, head, 0])
    return tl.reshape(tile, (BN, BD))


@triton.jit
def _gathered_tile(
    x, stride_b, stride_s, stride_h, z, head, first, position, kv_len, page_table, table_stride, pages,
    BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PAGE: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """The same through pointers; after a sequence's last key come zeros."""
    positions = position + tl.arange(0, BN)
    dims = tl.arange(0, BD)
    valid = positions < kv_len
    outer, inner = key_rows(z, first, positions, valid, page_table, table_stride, pages, PAGE, RAGGED)
    rows = x + outer * stride_b + inner * stride_s + head.to(tl.int64) * stride_h
    return tl.load(rows[:, None] + dims, mask=valid[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def _softmax_step(scores, scale, m, total, acc):
    """Weights of a tile, and the running maximum (in base 2), sum and accumulator brought to them."""
    new_m = tl.maximum(m, tl.max(scores, 1) * scale)
    p = tl.math.exp2(scores * scale - new_m[:, None])
    shrink = tl.math.exp2(m - new_m)
    return p, new_m, total * shrink + tl.sum(p, 1), acc * shrink[:, None]


@triton.jit(
    do_not_specialize=["lse_stride_b", "lse_stride_h", "table_stride", "pages", "q_len", "kv_len", "rows", "heavy", "width",
                       "window"]
)  # fmt: skip
def attention_kernel(
    q, k, v, k_tiles, v_tiles, out, lse, sinks, indices, counts, cu_q, cu_k, page_table,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h,
    o_stride_b, o_stride_s, o_stride_h, lse_stride_b, lse_stride_h, table_stride, pages,
    q_len, kv_len, heads, rows, heavy, width, scale, steepness, window,
    G: tl.constexpr, B: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr,
    BDV: tl.constexpr, PAGE: tl.constexpr, RAGGED: tl.constexpr, TMA: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """``sinks`` are ``(heads,)`` or None, ``window`` may be None, ``scale`` and ``steepness`` are as ``in_base_two`` says."""
    pid, z = tl.program_id(0), tl.program_id(1)
    # Dense tail rows are many times longer than the others: those of all heads start first. The rest go head by head, so
    # that programs running together read the same keys and values. Rows count from each sequence's end.
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
    positions = block * B + tl.arange(0, B)
    dims = tl.arange(0, BD)
    present = (positions >= start) & (positions < kv_len)
    if RAGGED:
        q_rows = (q_first + positions - start).to(tl.int64)
        q_base, o_base, lse_base = q, out, lse
    else:
        q_rows = (positions - start).to(tl.int64)
        q_base, o_base = q + z.to(tl.int64) * q_stride_b, out + z.to(tl.int64) * o_stride_b
        lse_base = lse + z.to(tl.int64) * lse_stride_b
    q_mask = present[:, None] & (dims < D)[None, :]
    q_tile = tl.load(q_base + q_rows[:, None] * q_stride_s + head.to(tl.int64) * q_stride_h + dims, mask=q_mask, other=0.0)

    kv_head = head // G
    at = (z.to(tl.int64) * heads + head) * rows + row
    # Nothing on the device has validated the selection: whatever it holds, reads stay inside the lists and the keys.
    count = tl.load(counts + at)
    ids = indices + at * width
    whole = count > block  # such a row keeps everything: its list is 0, 1, 2, ... and need not be there
    count = block + 1 if whole else tl.minimum(count, width)
    # Of the first tiles of a window a row may see no key: its maximum is then the least one, and not minus infinity.
    m = tl.full([B], -float("inf") if window is None else -1e30, tl.float32)
    total = tl.zeros([B], tl.float32)
    acc = tl.zeros([B, BDV], tl.float32)
    SUB: tl.constexpr = B // BN
    # Where the copy engine would read a neighbour's values behind a sequence's end (a zero weight times NaN is NaN), the
    # diagonal block gets a loop of its own, through pointers. Elsewhere a branch costs less than a second loop.
    PEEL: tl.constexpr = TMA and (RAGGED or PAGE > 0)
    for t in range(0, (count - 1 if PEEL else count) * SUB):
        entry = t // SUB
        kept = tl.load(ids + entry, mask=not whole, other=entry)
        kept = tl.minimum(tl.maximum(kept, 0), block)
        position = kept * B + (t % SUB) * BN
        if TMA:
            k_tile = _copied_tile(k_tiles, z, kv_head, k_first, position, kv_len, page_table, table_stride, pages,
                                  BN, BD, PAGE, RAGGED)  # fmt: skip
        else:
            k_tile = _gathered_tile(k, k_stride_b, k_stride_s, k_stride_h, z, kv_head, k_first, position, kv_len, page_table,
                                    table_stride, pages, BN, D, BD, PAGE, RAGGED)  # fmt: skip
        scores = tl.dot(q_tile, k_tile.T)
        if steepness is not None:
            scores = tanh(scores * steepness)
        if window is not None:  # noqa: SIM102  the first is decided when the kernel is compiled
            if block * B + B - position > window:
                scores = tl.where(positions[:, None] - (position + tl.arange(0, BN)) < window, scores, -float("inf"))
        if PEEL:
            pass
        elif entry == count - 1:
            scores = tl.where(positions[:, None] >= position + tl.arange(0, BN), scores, -float("inf"))
        p, m, total, acc = _softmax_step(scores, scale, m, total, acc)
        if TMA:
            v_tile = _copied_tile(v_tiles, z, kv_head, k_first, position, kv_len, page_table, table_stride, pages,
                                  BN, BDV, PAGE, RAGGED)  # fmt: skip
        else:
            v_tile = _gathered_tile(v, v_stride_b, v_stride_s, v_stride_h, z, kv_head, k_first, position, kv_len, page_table,
                                    table_stride, pages, BN, DV, BDV, PAGE, RAGGED)  # fmt: skip
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc)
    if PEEL:
        for t in range(0, SUB):
            position = block * B + t * BN
            k_tile = _gathered_tile(k, k_stride_b, k_stride_s, k_stride_h, z, kv_head, k_first, position, kv_len, page_table,
                                    table_stride, pages, BN, D, BD, PAGE, RAGGED)  # fmt: skip
            scores = tl.dot(q_tile, k_tile.T)
            if steepness is not None:
                scores = tanh(scores * steepness)
            scores = tl.where(positions[:, None] >= position + tl.arange(0, BN), scores, -float("inf"))
            if window is not None:
                scores = tl.where(positions[:, None] - (position + tl.arange(0, BN)) < window, scores, -float("inf"))
            p, m, total, acc = _softmax_step(scores, scale, m, total, acc)
            v_tile = _gathered_tile(v, v_stride_b, v_stride_s, v_stride_h, z, kv_head, k_first, position, kv_len, page_table,
                                    table_stride, pages, BN, DV, BDV, PAGE, RAGGED)  # fmt: skip
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc)

    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        new_m = tl.maximum(m, sink)
        shrink = tl.math.exp2(m - new_m)
        m, total, acc = new_m, total * shrink + tl.math.exp2(sink - new_m), acc * shrink[:, None]
    acc = acc / total[:, None]
    o_rows = o_base + q_rows[:, None] * o_stride_s + head.to(tl.int64) * o_stride_h
    dims = tl.arange(0, BDV)
    tl.store(o_rows + dims, acc.to(out.dtype.element_ty), mask=present[:, None] & (dims < DV)[None, :])
    if LSE:
        tl.store(
            lse_base + head.to(tl.int64) * lse_stride_h + q_rows, (m + tl.math.log2(total)) * 0.6931471805599453, mask=present
        )
