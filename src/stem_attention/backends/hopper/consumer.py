"""The consumers of the Hopper kernel: a warpgroup of four warps computes 64 query rows, its partner the other 64."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from stem_attention.backends.hopper.gluon_api import async_store, pinned, rescaled
from stem_attention.backends.hopper.schedule import next_ticket, open_task, steps_of

# Weights are relative to a maximum that may be this old, in base 2: they stay far below what 16 bits hold, and as exact.
SLACK: gl.constexpr = gl.constexpr(8.0)


@gluon.jit
def _products(q, s, blank, shared, REST: gl.constexpr):
    """Scores of the tile in slot ``s``, issued: products of the first columns, and of the rest where there is one."""
    _, k_s, _, _, _, _, _, _, _, _, _, _, k_rest = shared
    first, rest = q
    scores = warpgroup_mma(first, k_s.index(s).permute((1, 0)), blank, use_acc=False, is_async=True)
    if REST:
        scores = warpgroup_mma(rest, k_rest.index(s).permute((1, 0)), scores, is_async=True)
    return scores


@gluon.jit
def sums_of(p):
    """Eight sums of a row's weights: a thread holds two of every eight columns, so these need no exchange between threads."""
    return gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 8]), 1)


@gluon.jit
def _weights(scores, scale, m, LAZY: gl.constexpr = False):
    """Weights of a tile, the running maximum (in base 2), what older weights shrink by, and the tile's sums per thread.

    Where ``LAZY``, the maximum stays until it is behind by ``SLACK``: results then seldom have to shrink.
    """
    new_m = gl.max(scores, 1) * scale
    new_m = gl.where(new_m > m + SLACK, new_m, m) if LAZY else gl.maximum(m, new_m)
    p = gl.exp2(scores * scale - new_m[:, None])
    sums = sums_of(p)
    return p, new_m, gl.exp2(m - new_m), sums


@gluon.jit
def bounded(scores, steepness):
    """Scores under a soft cap, which is the scale then: products become their hyperbolic tangent."""
    return scores if steepness is None else 1.0 - 2.0 / (gl.exp2(scores * (steepness * 2.8853900817779268)) + 1.0)


@gluon.jit
def grown(total, shrink, sums):
    """Sums per thread of a row's weights so far, which shrink as the maximum grows, and of a further tile's."""
    return total * gl.convert_layout(shrink, gl.SliceLayout(1, sums.type.layout))[:, None] + sums


@gluon.jit
def masked(scores, first, w: gl.constexpr, BN: gl.constexpr, layout: gl.constexpr):
    """Minus infinity right of the diagonal; keys begin at the diagonal block's ``first``."""
    rows = w * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    columns = first + gl.arange(0, BN, layout=gl.SliceLayout(0, layout))
    return gl.where(rows[:, None] >= columns[None, :], scores, -float("inf"))


@gluon.jit
def clear_tail(s, parity, v_s, v_full, present, BN: gl.constexpr):
    """Zeros behind the last value of the tile in slot ``s``, where a neighbour's lie: a zero weight times NaN would be NaN."""
    if present < BN:
        tile = v_s.index(s)
        mbarrier.wait(v_full.index(s), parity)
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        step: gl.constexpr = 32
        for i in gl.static_range(BN // step):
            part = tile.slice(i * step, step)
            rows = i * step + gl.arange(0, step, layout=gl.SliceLayout(1, layout))
            values = part.load(layout)
            part.store(gl.where(rows[:, None] < present, values, gl.zeros_like(values)))
        fence_async_shared()


@gluon.jit
def _store_rows(staging, out, stride_s, stride_h, z, head, q_first, first, q_len, D: gl.constexpr, RAGGED: gl.constexpr):
    """Those of 64 result rows from ``first`` on that are rows of the sequence."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = first + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    dims = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    # Results are contiguous: a rectangular batch is packed too.
    base = q_first.to(gl.int64) if RAGGED else z.to(gl.int64) * q_len
    out_rows = out + (base + rows) * stride_s + head.to(gl.int64) * stride_h
    gl.store(out_rows[:, None] + dims[None, :], staging.load(layout), mask=((rows >= 0) & (rows < q_len))[:, None])
    fence_async_shared()


@gluon.jit
def write(acc, total, m, sink, read, staging, o_tiles, results, z, head, position, start, q_first, kv_len, D: gl.constexpr,
          RAGGED: gl.constexpr, LSE: gl.constexpr):  # fmt: skip
    """Results of the 64 rows from ``position`` on, when their last weighted values are there, of which ``read`` is told.

    They leave through the queries' shared memory, which this task needs no more.
    """
    out, o_stride_s, o_stride_h, lse, lse_stride_b, lse_stride_h, sinks = results
    out_rows: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16]))
    row_layout: gl.constexpr = m.type.layout
    row_total = gl.convert_layout(gl.sum(total, 1), row_layout)
    if sinks is not None:
        row_total += gl.exp2(sink - m)
    positions = position + gl.arange(0, 64, layout=row_layout)
    if LSE:
        rows = (q_first + positions - start).to(gl.int64)
        lse_base = lse + head.to(gl.int64) * lse_stride_h
        if not RAGGED:
            lse_base += z.to(gl.int64) * lse_stride_b
        gl.store(lse_base + rows, (m + gl.log2(row_total)) * 0.6931471805599453,
                 mask=(positions >= start) & (positions < kv_len))  # fmt: skip
    inverse = gl.convert_layout(1.0 / row_total, out_rows)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(read, count=1)
    dtype: gl.constexpr = staging.dtype
    staging.store((acc * inverse[:, None]).to(dtype))
    first = position - start
    # The copy engine drops rows behind a tensor's end. Rows before its beginning are an error to it.
    whole = first >= 0
    if RAGGED:
        whole = whole & (first + 64 <= kv_len - start)
    if whole:
        fence_async_shared()
        o_z = 0 if RAGGED else z
        async_store(o_tiles, [o_z, q_first + first, head, 0], staging._reinterpret(dtype, [1, 64, 1, D], o_tiles.layout))
        tma.store_wait(0)
    else:
        _store_rows(staging, out, o_stride_s, o_stride_h, z, head, q_first, first, kv_len - start, D, RAGGED)


@gluon.jit
def _step(t, q, p, m, total, acc, blank, shared, scales, present, w: gl.constexpr, SUB: gl.constexpr, WGS: gl.constexpr,
          BN: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr, RAGGED: gl.constexpr, REST: gl.constexpr):  # fmt: skip
    """Scores of the ``t``-th tile beside the weighted values of the one before, then softmax while the values still run.

    ``SUB`` is the tile's place in the diagonal block, which is masked, or 0 for every tile of another block. ``present``
    are the sequence's keys from the tile's first on.
    """
    _, _, v_s, _, k_full, v_full, k_empty, v_empty, _, _, turns, _, _ = shared
    scale, steepness = scales
    scores_layout: gl.constexpr = blank.type.layout
    out_layout: gl.constexpr = acc.type.layout
    # With one consumer of 64 columns there is little beside softmax: what it need not do counts.
    LAZY: gl.constexpr = WGS == 1 and D == 64
    before = (t - 1) % SLOTS
    s = t % SLOTS
    mbarrier.wait(k_full.index(s), (t // SLOTS) & 1)
    if WGS == 2:
        mbarrier.wait(turns.index(w), (t & 1) ^ (1 - w))
    scores = _products(q, s, blank, shared, REST)
    weights = gl.convert_layout(p.to(v_s.dtype), gl.DotOperandLayout(0, out_layout, 2))
    mbarrier.wait(v_full.index(before), ((t - 1) // SLOTS) & 1)
    acc = warpgroup_mma(weights, v_s.index(before), acc, is_async=True)
    if WGS == 2:
        mbarrier.arrive(turns.index(1 - w), count=1)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(k_empty.index(s), count=1)
    scores = bounded(scores, steepness)
    if SUB > 0:
        scores = masked(scores, SUB * BN, w, BN, scores_layout)
    p, m, shrink, sums = _weights(scores, scale, m, LAZY)
    total = grown(total, shrink, sums)
    if SUB == 0:
        total = pinned(total)
    elif RAGGED:
        clear_tail(t % SLOTS, (t // SLOTS) & 1, v_s, v_full, present, BN)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_empty.index(before), count=1)
    shrink = gl.convert_layout(shrink, gl.SliceLayout(1, out_layout))
    acc = rescaled(acc, shrink[:, None]) if LAZY else acc * shrink[:, None]
    return p, m, total, acc


@gluon.jit
def _consumer(w: gl.constexpr, tiles, shared, batch, lists, results, scales, WGS: gl.constexpr, BN: gl.constexpr,
              D: gl.constexpr, SLOTS: gl.constexpr, RAGGED: gl.constexpr, LSE: gl.constexpr, QREG: gl.constexpr,
              REST: gl.constexpr):  # fmt: skip
    B: gl.constexpr = 64 * WGS
    SUB: gl.constexpr = B // BN
    _, _, _, o_tiles = tiles
    scale, steepness = scales
    q_s, _, v_s, ticket_s, k_full, v_full, k_empty, v_empty, q_bars, ticket_bars, turns, q_rest, _ = shared
    _, counts, width, tickets, _ = lists
    _, _, _, _, _, _, sinks = results
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    q_layout: gl.constexpr = gl.DotOperandLayout(0, scores_layout, 2)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    dtype: gl.constexpr = q_s.dtype
    blank = gl.zeros([64, BN], gl.float32, scores_layout)
    t = 0
    n = 0
    served = 0
    ticket = gl.program_id(0)
    while ticket < tickets:
        z, head, block, row, start, q_first, _, kv_len = open_task(ticket, batch, B, RAGGED)
        if row >= 0:
            _, _, _, steps = steps_of(z, head, block, row, batch, counts, width, B, BN)
            mbarrier.wait(q_bars.index(0), n & 1)
            q = (q_s.index(w), q_rest.index(w))
            if QREG:
                q = (q_s.index(w).load(q_layout), q_rest.index(w).load(q_layout))
            n += 1
            acc = gl.zeros([64, D], gl.float32, out_layout)
            # A sink is a score without a value: the maximum begins with it, and its weight joins the sum at the end.
            sink = -float("inf")
            if sinks is not None:
                sink = gl.load(sinks + head).to(gl.float32) * 1.4426950408889634
            m = gl.full([64], sink, gl.float32, row_layout)

            # The diagonal block, peeled: its first tile has no values before it to weigh.
            s = t % SLOTS
            mbarrier.wait(k_full.index(s), (t // SLOTS) & 1)
            if WGS == 2:
                mbarrier.wait(turns.index(w), (t & 1) ^ (1 - w))
            scores = _products(q, s, blank, shared, REST)
            if WGS == 2:
                mbarrier.arrive(turns.index(1 - w), count=1)
            scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(k_empty.index(s), count=1)
            scores = bounded(scores, steepness)
            p, m, _, total = _weights(masked(scores, 0, w, BN, scores_layout), scale, m)
            present = kv_len - block * B
            if RAGGED:
                clear_tail(t % SLOTS, (t // SLOTS) & 1, v_s, v_full, present, BN)
            t += 1
            for sub in gl.static_range(1, SUB):
                p, m, total, acc = _step(t, q, p, m, total, acc, blank, shared, scales, present - sub * BN,
                                         w, sub, WGS, BN, D, SLOTS, RAGGED, REST)  # fmt: skip
                t += 1
            for _ in range(SUB, steps):
                p, m, total, acc = _step(t, q, p, m, total, acc, blank, shared, scales, present,
                                         w, 0, WGS, BN, D, SLOTS, RAGGED, REST)  # fmt: skip
                t += 1

            before = (t - 1) % SLOTS
            weights = gl.convert_layout(p.to(dtype), p_layout)
            mbarrier.wait(v_full.index(before), ((t - 1) // SLOTS) & 1)
            acc = warpgroup_mma(weights, v_s.index(before), acc, is_async=True)
            write(acc, total, m, sink, v_empty.index(before), q_s.index(w), o_tiles, results, z, head, block * B + w * 64,
                  start, q_first, kv_len, D, RAGGED, LSE)  # fmt: skip
            mbarrier.arrive(q_bars.index(1), count=1)
        ticket = next_ticket(served, ticket_s, ticket_bars)
        served += 1


@gluon.jit
def first_consumer(tiles, shared, batch, lists, results, scales, WGS: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
                   SLOTS: gl.constexpr, RAGGED: gl.constexpr, LSE: gl.constexpr, QREG: gl.constexpr,
                   REST: gl.constexpr):  # fmt: skip
    """Rows 0 to 63 of every block."""
    _consumer(0, tiles, shared, batch, lists, results, scales, WGS, BN, D, SLOTS, RAGGED, LSE, QREG, REST)


@gluon.jit
def second_consumer(tiles, shared, batch, lists, results, scales, WGS: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
                    SLOTS: gl.constexpr, RAGGED: gl.constexpr, LSE: gl.constexpr, QREG: gl.constexpr,
                    REST: gl.constexpr):  # fmt: skip
    """Rows 64 to 127."""
    _consumer(1, tiles, shared, batch, lists, results, scales, WGS, BN, D, SLOTS, RAGGED, LSE, QREG, REST)
