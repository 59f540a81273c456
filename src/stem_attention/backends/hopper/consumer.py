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

from stem_attention.backends.hopper.gluon_api import along, async_store, moved, pinned, rescaled, tops_of
from stem_attention.backends.hopper.schedule import told


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
def _weights(scores, scale, m):
    """Weights of a tile, the running maximum (in base 2), what older weights shrink by, and the tile's sums per thread."""
    new_m = gl.maximum(m, gl.max(scores, 1) * scale)
    p = gl.exp2(scores * scale - new_m[:, None])
    return p, new_m, gl.exp2(m - new_m), sums_of(p)


@gluon.jit
def exponents(scores, scale, m):
    """Exponents of a tile's weights in base 2, the maximum, which moves late, and what older weights shrink by."""
    m, shrink = moved(tops_of(scores), m, scale)
    return scores * scale - along(m, scores), m, shrink


@gluon.jit
def queries_read(empty):
    """Tell the producer that queries are in registers, when products of them have ended.

    A load from shared memory that has been issued has not been done. Neither a barrier of the warpgroup nor an arrival waits
    for it, and the copy engine, whose accesses are of another proxy, may overwrite what it has yet to read.
    """
    fence_async_shared()
    mbarrier.arrive(empty, count=1)


@gluon.jit
def sink_of(sinks, head):
    """A head's sink in base 2: a score without a value. The maximum begins with it, and its weight joins the sum at the end."""
    sink = -float("inf")
    if sinks is not None:
        sink = gl.load(sinks + head).to(gl.float32) * 1.4426950408889634
    return sink


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
def late_weights(x, shrink, total):
    """Weights of a tile, of which ``x`` are the exponents, where the maximum moves late; and the sums with them."""
    p = gl.exp2(x)
    return p, total * along(shrink, total) + sums_of(p)


@gluon.jit
def weighted(p, acc, s, lap, v_s, v_full):
    """Results with the values in slot ``s`` by their weights, issued. Of ``lap``, times round the ring, the parity counts."""
    weights = gl.convert_layout(p.to(v_s.dtype), gl.DotOperandLayout(0, acc.type.layout, 2))
    mbarrier.wait(v_full.index(s), lap & 1)
    return warpgroup_mma(weights, v_s.index(s), acc, is_async=True)


@gluon.jit
def late_step(x, m, shrink, total, acc, scores, s, before, lap, rings, scales):
    """Exponentials of the tile in slot ``before`` beside the next one's scores, of slot ``s``, which have been issued.

    Then the next one's exponents beside the weighted values of this one. ``lap`` is that of ``before``.
    """
    v_s, v_full, k_empty, v_empty = rings
    scale, steepness = scales
    p, total = late_weights(x, shrink, total)
    acc = weighted(p, acc, before, lap, v_s, v_full)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(k_empty.index(s), count=1)
    x, m, shrink = exponents(bounded(scores, steepness), scale, m)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_empty.index(before), count=1)
    return x, m, shrink, total, rescaled(acc, along(shrink, acc))


@gluon.jit
def _results(acc, total, m, sink, read, results, z, head, position, start, q_first, kv_len, D: gl.constexpr,
             RAGGED: gl.constexpr, LSE: gl.constexpr):  # fmt: skip
    """Results of the 64 rows from ``position`` on, when their last weighted values are there, of which ``read`` is told.

    Writes their log-sum-exp.
    """
    _, _, _, lse, lse_stride_b, lse_stride_h, sinks = results
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
    return acc * inverse[:, None]


@gluon.jit
def _store(values, out, stride_s, stride_h, z, head, q_first, first, q_len, RAGGED: gl.constexpr):
    """Those of 64 result rows from ``first`` on that are rows of the sequence."""
    layout: gl.constexpr = values.type.layout
    rows = first + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    dims = gl.arange(0, values.shape[1], layout=gl.SliceLayout(0, layout))
    # Results are contiguous: a rectangular batch is packed too.
    base = q_first.to(gl.int64) if RAGGED else z.to(gl.int64) * q_len
    out_rows = out + (base + rows) * stride_s + head.to(gl.int64) * stride_h
    gl.store(out_rows[:, None] + dims[None, :], values, mask=((rows >= 0) & (rows < q_len))[:, None])


@gluon.jit
def _write(acc, total, m, sink, read, staging, o_tiles, results, z, head, position, start, q_first, kv_len, D: gl.constexpr,
           RAGGED: gl.constexpr, LSE: gl.constexpr):  # fmt: skip
    """Write 64 rows through the queries' shared memory, which this task needs no more."""
    acc = _results(acc, total, m, sink, read, results, z, head, position, start, q_first, kv_len, D, RAGGED, LSE)
    out, o_stride_s, o_stride_h, _, _, _, _ = results
    staging.store(acc.to(staging.dtype))
    first = position - start
    # The copy engine drops rows behind a tensor's end. Rows before its beginning are an error to it.
    whole = first >= 0
    if RAGGED:
        whole = whole & (first + 64 <= kv_len - start)
    if whole:
        fence_async_shared()
        o_z = 0 if RAGGED else z
        to = staging._reinterpret(staging.dtype, [1, 64, 1, D], o_tiles.layout)
        async_store(o_tiles, [o_z, q_first + first, head, 0], to)
        tma.store_wait(0)
    else:
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        _store(staging.load(layout), out, o_stride_s, o_stride_h, z, head, q_first, first, kv_len - start, RAGGED)
        fence_async_shared()


@gluon.constexpr_function
def _exchanged(D, times):
    """The layout of 64 rows of products when neighbouring threads have exchanged numbers once, or twice.

    After the second time eight of a thread's columns lie together.
    """
    own = [[0, 1], [0, 2], [8, 0], [0, 16]] if times == 1 else [[0, 1], [0, 2], [0, 4], [8, 0]]
    far = [[0, 32], [0, 64], [0, 128]][: (D // 32).bit_length() - 1]
    lanes = [[0, 8], [0, 4] if times == 1 else [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(own + far, lanes, [[16, 0], [32, 0]], [], [64, D])


@gluon.jit
def write_registers(acc, total, m, sink, read, results, z, head, position, start, q_first, kv_len, D: gl.constexpr,
                    RAGGED: gl.constexpr, LSE: gl.constexpr):  # fmt: skip
    """Write 64 rows straight from registers: nothing waits for them, and the queries' shared memory is free meanwhile.

    Four threads that have a row exchange numbers until each has 16 bytes in one piece, and the four together 64.
    """
    acc = _results(acc, total, m, sink, read, results, z, head, position, start, q_first, kv_len, D, RAGGED, LSE)
    out, o_stride_s, o_stride_h, _, _, _, _ = results
    values = gl.convert_layout(acc.to(out.dtype.element_ty), _exchanged(D, 1))
    # Triton would make one exchange of two, through shared memory.
    values = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [values], dtype=values.dtype, is_pure=True, pack=2)
    values = gl.convert_layout(values, _exchanged(D, 2))
    _store(values, out, o_stride_s, o_stride_h, z, head, q_first, position - start, kv_len - start, RAGGED)


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
    before = (t - 1) % SLOTS
    s = t % SLOTS
    mbarrier.wait(k_full.index(s), (t // SLOTS) & 1)
    if WGS == 2:
        mbarrier.wait(turns.index(w), (t & 1) ^ (1 - w))
    scores = _products(q, s, blank, shared, REST)
    acc = weighted(p, acc, before, (t - 1) // SLOTS, v_s, v_full)
    if WGS == 2:
        mbarrier.arrive(turns.index(1 - w), count=1)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(k_empty.index(s), count=1)
    scores = bounded(scores, steepness)
    if SUB > 0:
        scores = masked(scores, SUB * BN, w, BN, scores_layout)
    p, m, shrink, sums = _weights(scores, scale, m)
    total = grown(total, shrink, sums)
    if SUB == 0:
        total = pinned(total)
    elif RAGGED:
        clear_tail(t % SLOTS, (t // SLOTS) & 1, v_s, v_full, present, BN)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_empty.index(before), count=1)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, out_layout))[:, None]
    return p, m, total, acc


@gluon.jit
def _consumer(w: gl.constexpr, tiles, shared, batch, lists, results, scales, WGS: gl.constexpr, BN: gl.constexpr,
              D: gl.constexpr, SLOTS: gl.constexpr, RAGGED: gl.constexpr, LSE: gl.constexpr, QREG: gl.constexpr,
              REST: gl.constexpr):  # fmt: skip
    B: gl.constexpr = 64 * WGS
    SUB: gl.constexpr = B // BN
    _, _, _, o_tiles = tiles
    scale, steepness = scales
    q_s, _, v_s, task_s, k_full, v_full, k_empty, v_empty, q_bars, task_bars, turns, q_rest, _ = shared
    _, _, _, _, _, _, sinks = results
    rings = v_s, v_full, k_empty, v_empty
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    q_layout: gl.constexpr = gl.DotOperandLayout(0, scores_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    # With one consumer of 64 columns there is little beside softmax: what it need not do counts.
    LATE: gl.constexpr = WGS == 1 and D == 64
    blank = gl.zeros([64, BN], gl.float32, scores_layout)
    t = 0
    n = 0
    served = 0
    z, head, block, _row, start, q_first, kv_len, steps = told(1, served, task_s, task_bars)
    while z >= 0:
        mbarrier.wait(q_bars.index(0), n & 1)
        q = (q_s.index(w), q_rest.index(w))
        if QREG:
            q = (q_s.index(w).load(q_layout), q_rest.index(w).load(q_layout))
        n += 1
        acc = gl.zeros([64, D], gl.float32, out_layout)
        sink = sink_of(sinks, head)
        m = tops_of(blank) + sink if LATE else gl.full([64], sink, gl.float32, row_layout)

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
        if QREG:
            queries_read(q_bars.index(1))
        scores = bounded(scores, steepness)
        if LATE:
            x, m, shrink = exponents(masked(scores, 0, w, BN, scores_layout), scale, m)
            total = sums_of(blank)
        else:
            p, m, _, total = _weights(masked(scores, 0, w, BN, scores_layout), scale, m)
        present = kv_len - block * B
        if RAGGED:
            clear_tail(t % SLOTS, (t // SLOTS) & 1, v_s, v_full, present, BN)
        t += 1
        if LATE:
            for _ in range(1, steps):
                s = t % SLOTS
                mbarrier.wait(k_full.index(s), (t // SLOTS) & 1)
                x, m, shrink, total, acc = late_step(x, m, shrink, total, acc, _products(q, s, blank, shared, REST), s,
                                                     (t - 1) % SLOTS, (t - 1) // SLOTS, rings, scales)  # fmt: skip
                t += 1
            p, total = late_weights(x, shrink, total)
        else:
            for sub in gl.static_range(1, SUB):
                p, m, total, acc = _step(t, q, p, m, total, acc, blank, shared, scales, present - sub * BN,
                                         w, sub, WGS, BN, D, SLOTS, RAGGED, REST)  # fmt: skip
                t += 1
            for _ in range(SUB, steps):
                p, m, total, acc = _step(t, q, p, m, total, acc, blank, shared, scales, present,
                                         w, 0, WGS, BN, D, SLOTS, RAGGED, REST)  # fmt: skip
                t += 1

        before = (t - 1) % SLOTS
        acc = weighted(p, acc, before, (t - 1) // SLOTS, v_s, v_full)
        if LATE:
            m = gl.convert_layout(gl.max(m, 1), row_layout)
        if QREG:
            write_registers(acc, total, m, sink, v_empty.index(before), results, z, head, block * B + w * 64, start, q_first,
                            kv_len, D, RAGGED, LSE)  # fmt: skip
        else:
            _write(acc, total, m, sink, v_empty.index(before), q_s.index(w), o_tiles, results, z, head, block * B + w * 64,
                   start, q_first, kv_len, D, RAGGED, LSE)  # fmt: skip
            mbarrier.arrive(q_bars.index(1), count=1)
        served += 1
        z, head, block, _row, start, q_first, kv_len, steps = told(1, served, task_s, task_bars)


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
