"""The producer of the Hopper kernel for pairs of rows: one warp that merges two lists and has their tiles fetched."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from stem_attention.backends.hopper.gluon_api import async_load, bits_set, lowest_bit
from stem_attention.backends.hopper.producer import copy_tile
from stem_attention.backends.hopper.schedule import (
    blocks_before,
    drawn,
    list_of,
    mask_of,
    open_task,
    slot_of,
    tell,
    ticket_of,
)


@gluon.jit
def _copy_queries(w: gl.constexpr, q_tiles, q_s, q_bars, n, z, first, head, D: gl.constexpr):
    mbarrier.wait(q_bars.index(2 + w), (n & 1) ^ 1)
    mbarrier.expect(q_bars.index(w), 64 * D * 2)
    async_load(q_tiles, [z, first, head, 0], q_bars.index(w),
               q_s.index(w)._reinterpret(q_s.dtype, [1, 64, 1, D], q_tiles.layout))  # fmt: skip


@gluon.jit
def _publish(w: gl.constexpr, mine, both, plans, plan_s, plan_bars, PLANS: gl.constexpr):
    """Tell row ``w`` which of the next 32 blocks it keeps and shares; of blocks that it does not keep it never hears."""
    if mine != 0:
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
        plan = w * PLANS + plans % PLANS
        mbarrier.wait(plan_bars.index(2 * PLANS + plan), ((plans // PLANS) & 1) ^ 1)
        plan_s.index(2 * plan).store(gl.full([1], mine, gl.int32, layout))
        plan_s.index(2 * plan + 1).store(gl.full([1], both, gl.int32, layout))
        mbarrier.arrive(plan_bars.index(plan), count=1)
        plans += 1
    return plans


@gluon.jit
def pair_producer(tiles, shared, batch, lists, pages, queue, D: gl.constexpr, SLOTS: gl.constexpr, PLANS: gl.constexpr,
                  PAGE: gl.constexpr, RAGGED: gl.constexpr, BOX: gl.constexpr):  # fmt: skip
    """Fill the rings for one task after another; consumers learn of a task through two slots.

    Nothing waits in a circle. Tiles are fetched in the order of both lists together, values one tile behind keys, and plans are
    told before their tiles. A consumer takes its tiles in that order and holds at most two tiles' values and one tile's keys,
    so with two slots a ring what the producer waits for never waits for what it has yet to fetch or tell.
    """
    q_tiles, k_tiles, v_tiles = tiles
    q_s, k_s, v_s, task_s, plan_s, k_full, v_full, k_empty, v_empty, q_bars, task_bars, plan_bars = shared
    indices, counts, width, tickets, group = lists
    lane: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    both_read = 0
    own0 = 0
    own1 = 0
    plans0 = 0
    plans1 = 0
    n0 = 0
    n1 = 0
    served = 0
    ticket = gl.program_id(0)
    while ticket < tickets:
        z, head, block, row, start, q_first, k_first, kv_len = open_task(ticket, batch, 64, RAGGED, 2)
        if row >= 0:
            kv_head = head // group
            offset1, left1, whole1 = list_of(z, head, block, row, batch, counts, width, 64)
            offset0, left0, whole0 = list_of(z, head, block - 1, row - 1, batch, counts, width, 64)
            tell(served, task_s, task_bars, z, head, block, row, start, q_first, kv_len, left0, left1)
            served += 1
            entries1 = left1
            entries0 = left0
            q_z = 0 if RAGGED else z
            first = q_first + block * 64 - start
            _copy_queries(1, q_tiles, q_s, q_bars, n1, q_z, first, head, D)
            n1 += 1
            if row > 0:
                _copy_queries(0, q_tiles, q_s, q_bars, n0, q_z, first - 64, head, D)
                n0 += 1
            before = -1
            before_slot = 0
            before_parity = 0
            while left0 + left1 > 0:
                blocks0 = blocks_before(left0, indices, offset0, entries0, whole0, block - 1, lane)
                blocks1 = blocks_before(left1, indices, offset1, entries1, whole1, block, lane)
                top = gl.maximum(gl.max(blocks0, 0), gl.max(blocks1, 0))
                mask0 = mask_of(blocks0, top)
                mask1 = mask_of(blocks1, top)
                left0 -= bits_set(mask0)
                left1 -= bits_set(mask1)
                both = mask0 & mask1
                plans0 = _publish(0, mask0, both, plans0, plan_s, plan_bars, PLANS)
                plans1 = _publish(1, mask1, both, plans1, plan_s, plan_bars, PLANS)
                either = mask0 | mask1
                while either != 0:
                    bit = either & -either
                    at = (top - lowest_bit(either)) * 64
                    either = either & (either - 1)
                    common = (both & bit) != 0
                    second = (mask1 & bit) != 0
                    w = second.to(gl.int32)
                    slot, parity = slot_of(common, both_read, gl.where(second, own1, own0), w, SLOTS)
                    both_read += common.to(gl.int32)
                    if not common:
                        own0 += 1 - w
                        own1 += w
                    copy_tile(k_tiles, k_s, k_s, k_full, k_empty, slot, parity, z, kv_head, at, k_first, kv_len, pages, 64, D,
                              PAGE, RAGGED, BOX, 0)  # fmt: skip
                    if before >= 0:
                        copy_tile(v_tiles, v_s, v_s, v_full, v_empty, before_slot, before_parity, z, kv_head, before, k_first,
                                  kv_len, pages, 64, D, PAGE, RAGGED, BOX, 0)  # fmt: skip
                    before = at
                    before_slot = slot
                    before_parity = parity
            # Asked for behind the last keys, and there when the last values' slot is free.
            number = drawn(queue)
            copy_tile(v_tiles, v_s, v_s, v_full, v_empty, before_slot, before_parity, z, kv_head, before, k_first, kv_len,
                      pages, 64, D, PAGE, RAGGED, BOX, 0)  # fmt: skip
        else:
            number = drawn(queue)
        ticket = ticket_of(number, queue, tickets)
    tell(served, task_s, task_bars, -1, 0, 0, 0, 0, 0, 0, 0, 0)
