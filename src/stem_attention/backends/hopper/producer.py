"""The producer of the Hopper kernel: one warp that hands out tasks and has the copy engine fetch their tiles."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from stem_attention.backends.hopper.gluon_api import async_load
from stem_attention.backends.hopper.schedule import drawn, keys_of, open_task, steps_of, tell, ticket_of


@gluon.jit
def copy_tile(tiles, ring, rest, full, empty, s, parity, z, head, position, k_first, kv_len, pages, BN: gl.constexpr,
              D: gl.constexpr, PAGE: gl.constexpr, RAGGED: gl.constexpr, BOX: gl.constexpr, REST: gl.constexpr):  # fmt: skip
    """The keys or values from ``position`` on, into slot ``s`` of a ring.

    Columns behind the first ``D``, ``REST`` of them, go to a ring of their own.
    """
    page_table, table_stride, page_count = pages
    mbarrier.wait(empty.index(s), parity ^ 1)
    mbarrier.expect(full.index(s), BN * (D + REST) * 2)
    for part in gl.static_range(BN // BOX):
        at = position + part * BOX
        if PAGE:
            # A block's later boxes may begin after the last key, where the table may end.
            page = gl.load(page_table + z.to(gl.int64) * table_stride + at // PAGE, mask=at < kv_len, other=0)
            outer = gl.minimum(gl.maximum(page, 0), page_count - 1)
            inner = at % PAGE
        elif RAGGED:
            outer = 0
            inner = k_first + at
        else:
            outer = z
            inner = at
        if BOX == BN and REST == 0:
            slot = ring.index(s)._reinterpret(ring.dtype, [1, BN, 1, D], tiles.layout)
            async_load(tiles, [outer, inner, head, 0], full.index(s), slot)
        else:
            # Shared memory holds BN rows of 64 columns after one another.
            parts = ring.index(s)._reinterpret(ring.dtype, [D // 64 * (BN // BOX), 1, BOX, 1, 64], tiles.layout)
            for column in gl.static_range(D // 64):
                async_load(tiles, [outer, inner, head, column * 64], full.index(s), parts.index(column * (BN // BOX) + part))
        if REST:
            parts = rest.index(s)._reinterpret(ring.dtype, [BN // BOX, 1, BOX, 1, REST], tiles.layout)
            async_load(tiles, [outer, inner, head, D], full.index(s), parts.index(part))


@gluon.jit
def _copy_rows(tiles, ring, rest, full, empty, t, z, head, position, k_first, kv_len, pages, SLOTS: gl.constexpr,
               BN: gl.constexpr, D: gl.constexpr, PAGE: gl.constexpr, RAGGED: gl.constexpr, BOX: gl.constexpr,
               REST: gl.constexpr):  # fmt: skip
    """The ``t``-th tile of a ring."""
    copy_tile(tiles, ring, rest, full, empty, t % SLOTS, (t // SLOTS) & 1, z, head, position, k_first, kv_len, pages,
              BN, D, PAGE, RAGGED, BOX, REST)  # fmt: skip


@gluon.jit
def producer(tiles, shared, batch, lists, pages, queue, WGS: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
             SLOTS: gl.constexpr, PAGE: gl.constexpr, RAGGED: gl.constexpr, BOX: gl.constexpr, REST: gl.constexpr):  # fmt: skip
    """Fill the rings for one task after another; consumers learn of a task through two slots."""
    B: gl.constexpr = 64 * WGS
    q_tiles, k_tiles, v_tiles, _ = tiles
    q_s, k_s, v_s, task_s, k_full, v_full, k_empty, v_empty, q_bars, task_bars, _, q_rest, k_rest = shared
    indices, counts, width, tickets, group = lists
    t = 0
    n = 0
    served = 0
    ticket = gl.program_id(0)
    while ticket < tickets:
        z, head, block, row, start, q_first, k_first, kv_len = open_task(ticket, batch, B, RAGGED)
        if row >= 0:
            kv_head = head // group
            offset, entries, whole, steps = steps_of(z, head, block, row, batch, counts, width, B, BN)
            tell(served, task_s, task_bars, z, head, block, row, start, q_first, kv_len, 0, steps)
            served += 1
            mbarrier.wait(q_bars.index(1), (n & 1) ^ 1)
            mbarrier.expect(q_bars.index(0), B * (D + REST) * 2)
            q_z = 0 if RAGGED else z
            for w in gl.static_range(WGS):
                first = q_first + block * B - start + w * 64
                if REST:
                    parts = q_s.index(w)._reinterpret(q_s.dtype, [D // 64, 1, 64, 1, 64], q_tiles.layout)
                    for column in gl.static_range(D // 64):
                        async_load(q_tiles, [q_z, first, head, column * 64], q_bars.index(0), parts.index(column))
                    rest = q_rest.index(w)._reinterpret(q_s.dtype, [1, 64, 1, REST], q_tiles.layout)
                    async_load(q_tiles, [q_z, first, head, D], q_bars.index(0), rest)
                else:
                    async_load(q_tiles, [q_z, first, head, 0], q_bars.index(0),
                               q_s.index(w)._reinterpret(q_s.dtype, [1, 64, 1, D], q_tiles.layout))  # fmt: skip
            n += 1
            # From the list's end: the diagonal block goes first. Copies in the order in which slots become free: a step's keys
            # are done with before the values of the step before.
            before = 0
            for i in range(steps):
                position = keys_of(i, indices, offset, entries, whole, block, B, BN)
                _copy_rows(k_tiles, k_s, k_rest, k_full, k_empty, t, z, kv_head, position, k_first, kv_len, pages,
                           SLOTS, BN, D, PAGE, RAGGED, BOX, REST)  # fmt: skip
                if i > 0:
                    _copy_rows(v_tiles, v_s, v_s, v_full, v_empty, t - 1, z, kv_head, before, k_first, kv_len, pages,
                               SLOTS, BN, D, PAGE, RAGGED, BOX, 0)  # fmt: skip
                before = position
                t += 1
            # Asked for behind the last keys, and there when the last values' slot is free.
            number = drawn(queue)
            _copy_rows(v_tiles, v_s, v_s, v_full, v_empty, t - 1, z, kv_head, before, k_first, kv_len, pages,
                       SLOTS, BN, D, PAGE, RAGGED, BOX, 0)  # fmt: skip
        else:
            number = drawn(queue)
        ticket = ticket_of(number, queue, tickets)
    tell(served, task_s, task_bars, -1, 0, 0, 0, 0, 0, 0, 0, 0)
