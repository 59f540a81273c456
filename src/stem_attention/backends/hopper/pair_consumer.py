"""The consumers of the Hopper kernel for pairs of rows: a warpgroup of four warps computes one of the two rows."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from stem_attention.backends.hopper.consumer import (
    bounded,
    clear_tail,
    exponents,
    late_step,
    late_weights,
    masked,
    queries_read,
    sink_of,
    sums_of,
    weighted,
    write_registers,
)
from stem_attention.backends.hopper.gluon_api import tops_of
from stem_attention.backends.hopper.schedule import slot_of, told


@gluon.jit
def _next_tile(w: gl.constexpr, more, mine, both, plans, before, own, plan_s, plan_bars, SLOTS: gl.constexpr,
               PLANS: gl.constexpr):  # fmt: skip
    """Slot and parity of a row's next tile where there are ``more``, and what is left of its plan.

    A plan is two words: which of 32 blocks the row keeps, and which of these its partner keeps too.
    """
    if (mine == 0) & more:
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        plan = w * PLANS + plans % PLANS
        mbarrier.wait(plan_bars.index(plan), (plans // PLANS) & 1)
        mine = gl.max(plan_s.index(plan * 2).load(layout), 0)
        both = gl.max(plan_s.index(plan * 2 + 1).load(layout), 0)
        mbarrier.arrive(plan_bars.index(2 * PLANS + plan), count=1)
        plans += 1
    shared = (both & mine & -mine) != 0
    mine = mine & (mine - 1)
    slot, parity = slot_of(shared, before, own, w, SLOTS)
    step = shared.to(gl.int32)
    return slot, parity, mine, both, plans, before + step, own + more.to(gl.int32) - step


@gluon.jit
def _row(w: gl.constexpr, shared, results, scales, D: gl.constexpr, SLOTS: gl.constexpr,
         PLANS: gl.constexpr, RAGGED: gl.constexpr, LSE: gl.constexpr):  # fmt: skip
    """Row ``w`` of every pair; 1 is the later one, which every pair has."""
    scale, steepness = scales
    q_s, k_s, v_s, task_s, plan_s, k_full, v_full, k_empty, v_empty, q_bars, task_bars, plan_bars = shared
    _, _, _, _, _, _, sinks = results
    rings = v_s, v_full, k_empty, v_empty
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    q_layout: gl.constexpr = gl.DotOperandLayout(0, scores_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    blank = gl.zeros([64, 64], gl.float32, scores_layout)
    both_read = 0
    own = 0
    plans = 0
    mine = 0
    both = 0
    n = 0
    served = 0
    z, head, later, later_row, start, q_first, kv_len, entries = told(w, served, task_s, task_bars)
    while z >= 0:
        block = later - 1 + w
        row = later_row - 1 + w
        if row >= 0:
            mbarrier.wait(q_bars.index(w), n & 1)
            q = q_s.index(w).load(q_layout)
            n += 1
            acc = gl.zeros([64, D], gl.float32, out_layout)
            sink = sink_of(sinks, head)
            m = tops_of(blank) + sink

            # The diagonal block, peeled: there are no weights beside its scores.
            slot, parity, mine, both, plans, both_read, own = _next_tile(w, entries > 0, mine, both, plans, both_read, own,
                                                                         plan_s, plan_bars, SLOTS, PLANS)  # fmt: skip
            now = slot
            now_parity = parity
            mbarrier.wait(k_full.index(now), now_parity)
            scores = warpgroup_mma(q, k_s.index(now).permute((1, 0)), blank, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(k_empty.index(now), count=1)
            queries_read(q_bars.index(2 + w))
            scores = masked(bounded(scores, steepness), 0, 0, 64, scores_layout)
            if RAGGED:
                clear_tail(now, now_parity, v_s, v_full, kv_len - block * 64, 64)
            x, m, shrink = exponents(scores, scale, m)
            total = sums_of(blank)
            slot, parity, mine, both, plans, both_read, own = _next_tile(w, entries > 1, mine, both, plans, both_read, own,
                                                                         plan_s, plan_bars, SLOTS, PLANS)  # fmt: skip
            for i in range(1, entries):
                mbarrier.wait(k_full.index(slot), parity)
                issued = warpgroup_mma(q, k_s.index(slot).permute((1, 0)), blank, use_acc=False, is_async=True)
                ahead = slot
                ahead_parity = parity
                slot, parity, mine, both, plans, both_read, own = _next_tile(w, i + 1 < entries, mine, both, plans, both_read,
                                                                             own, plan_s, plan_bars, SLOTS, PLANS)  # fmt: skip
                x, m, shrink, total, acc = late_step(x, m, shrink, total, acc, issued, ahead, now, now_parity, rings, scales)
                now = ahead
                now_parity = ahead_parity

            p, total = late_weights(x, shrink, total)
            acc = weighted(p, acc, now, now_parity, v_s, v_full)
            m = gl.convert_layout(gl.max(m, 1), row_layout)
            write_registers(acc, total, m, sink, v_empty.index(now), results, z, head, block * 64, start, q_first, kv_len, D,
                            RAGGED, LSE)  # fmt: skip
        served += 1
        z, head, later, later_row, start, q_first, kv_len, entries = told(w, served, task_s, task_bars)


@gluon.jit
def first_of_pair(shared, results, scales, D: gl.constexpr, SLOTS: gl.constexpr, PLANS: gl.constexpr,
                  RAGGED: gl.constexpr, LSE: gl.constexpr):  # fmt: skip
    """The earlier row; the first row of an odd number has none before it."""
    _row(0, shared, results, scales, D, SLOTS, PLANS, RAGGED, LSE)


@gluon.jit
def second_of_pair(shared, results, scales, D: gl.constexpr, SLOTS: gl.constexpr, PLANS: gl.constexpr,
                   RAGGED: gl.constexpr, LSE: gl.constexpr):  # fmt: skip
    """The later row."""
    _row(1, shared, results, scales, D, SLOTS, PLANS, RAGGED, LSE)
