"""Describe which program computes which query block of which head, and in what order. Shared by producer and consumers."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from stem_attention.backends.hopper.gluon_api import either


@gluon.jit
def task_of(ticket, batch):
    """``(sequence, head, tasks from the sequence's end)`` of the ``ticket``-th task.

    Dense tail rows are many times longer than the others: those of all heads go first. The others go in bands of
    neighbouring rows, head by head, so that programs running together read the same keys; a sequence's first rows, which
    are the shortest, come last and level out who finishes when.
    """
    _, _, _, _, sequences, heads, _, heavy, band = batch
    heavy_tasks = heavy * heads * sequences
    rest = ticket - heavy_tasks
    column = rest // band
    is_heavy = ticket < heavy_tasks
    head = gl.where(is_heavy, ticket, column) % heads
    z = (gl.where(is_heavy, ticket, column) // heads) % sequences
    from_end = gl.where(is_heavy, ticket // (heads * sequences), heavy + column // (heads * sequences) * band + rest % band)
    return z, head, from_end


@gluon.jit
def place_of(z, from_end, batch, B: gl.constexpr, RAGGED: gl.constexpr, ROWS: gl.constexpr = 1):
    """``(block, row, first position, query's first token, key's first token, kv_len)``; the row is negative where none is.

    Of a task of two rows it is the later one's; the first row of an odd number is alone.
    """
    cu_q, cu_k, q_len, kv_len, _, _, rows, _, _ = batch
    q_first = 0
    k_first = 0
    if RAGGED:
        q_first = gl.load(cu_q + z)
        q_len = gl.load(cu_q + z + 1) - q_first
        k_first = gl.load(cu_k + z)
        kv_len = gl.load(cu_k + z + 1) - k_first
    start = kv_len - q_len
    block = (kv_len - 1) // B - from_end * ROWS
    row = block - start // B
    if (q_len <= 0) | (from_end * ROWS >= rows):
        row = -1
    return block, row, start, q_first, k_first, kv_len


@gluon.jit
def open_task(ticket, batch, B: gl.constexpr, RAGGED: gl.constexpr, ROWS: gl.constexpr = 1):
    """``(sequence, head)`` of the ``ticket``-th task, and its :func:`place_of`."""
    z, head, from_end = task_of(ticket, batch)
    block, row, start, q_first, k_first, kv_len = place_of(z, from_end, batch, B, RAGGED, ROWS)
    return z, head, block, row, start, q_first, k_first, kv_len


@gluon.jit
def hand_out(queue, tickets, served, ticket_s, ticket_bars):
    """Take the next ticket from the queue and give it to the consumers, through one of two slots; the producer's part."""
    taken = gl.atomic_add(queue, 1)
    if taken == tickets - 1:  # as many are taken as there are: nobody asks again, and the next launch finds a new queue
        gl.store(queue, 0)
    ticket = taken + gl.num_programs(0)
    slot = served % 2
    mbarrier.wait(ticket_bars.index(2 + slot), ((served // 2) & 1) ^ 1)
    ticket_s.index(slot).store(gl.full([1], ticket, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    mbarrier.arrive(ticket_bars.index(slot), count=1)
    return ticket


@gluon.jit
def next_ticket(served, ticket_s, ticket_bars):
    """The ticket that :func:`hand_out` gives next; the part of a consumer of four warps."""
    slot = served % 2
    mbarrier.wait(ticket_bars.index(slot), (served // 2) & 1)
    ticket = gl.max(ticket_s.index(slot).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
    mbarrier.arrive(ticket_bars.index(2 + slot), count=1)
    return ticket


@gluon.jit
def steps_of(z, head, block, row, batch, counts, width, B: gl.constexpr, BN: gl.constexpr):
    """``(list's offset, entries, whole, steps)`` of a row. Nothing has validated the selection: reads stay inside the list."""
    _, _, _, _, _, heads, rows, _, _ = batch
    at = (z.to(gl.int64) * heads + head) * rows + row
    count = gl.load(counts + at)
    whole = count > block  # such a row keeps everything: its list is 0, 1, 2, ... and need not be there
    entries = gl.where(whole, block + 1, gl.maximum(gl.minimum(count, width), 1))
    return at * width, entries, whole, (entries * B + BN - 1) // BN


@gluon.jit
def _block_of(entry, indices, offset, entries, whole, block):
    """The block that a row's ``entry``-th names; the last is the diagonal block."""
    kept = gl.load(indices + offset + entry, mask=(not whole) & (entry < entries - 1), other=entry)
    return gl.minimum(gl.maximum(gl.where(entry < entries - 1, kept, block), 0), block)


@gluon.jit
def list_of(z, head, block, row, batch, counts, width, B: gl.constexpr):
    """``(list's offset, entries, whole)`` of a row, as :func:`steps_of` has them; no entries where there is no such row."""
    offset, entries, whole, _ = steps_of(z, head, block, gl.maximum(row, 0), batch, counts, width, B, B)
    return offset, gl.where(row >= 0, entries, 0), whole


@gluon.jit
def keys_of(i, indices, offset, entries, whole, block, B: gl.constexpr, BN: gl.constexpr):
    """First key of a row's ``i``-th step, which takes a block or a part of one. The diagonal block goes first."""
    SUB: gl.constexpr = B // BN
    return _block_of(entries - 1 - i // SUB, indices, offset, entries, whole, block) * B + i % SUB * BN


@gluon.jit
def blocks_before(left, indices, offset, entries, whole, block, layout: gl.constexpr):
    """The blocks that the last 32 of a list's first ``left`` entries name, the latest first; -1 where there are no more."""
    entry = left - 1 - gl.arange(0, 32, layout=layout)
    return gl.where(entry >= 0, _block_of(gl.maximum(entry, 0), indices, offset, entries, whole, block), -1)


@gluon.jit
def mask_of(blocks, top):
    """Bit ``i`` where ``top - i`` is among the blocks."""
    behind = top - blocks
    inside = (blocks >= 0) & (behind >= 0) & (behind < 32)
    one = gl.full(blocks.shape, 1, gl.int32, blocks.type.layout)
    return gl.reduce(gl.where(inside, one << gl.where(inside, behind, 0), 0), 0, either)


@gluon.jit
def slot_of(shared, before, own, w, SLOTS: gl.constexpr):
    """``(slot, parity)`` of a tile: the next of the ring that both rows of a pair read, or of row ``w``'s own.

    ``before`` tiles of the former came before it, and ``own`` of the latter.
    """
    before = before.to(gl.uint32)
    own = own.to(gl.uint32)
    slot = gl.where(shared, before % SLOTS, SLOTS + w * SLOTS + own % SLOTS)
    return slot.to(gl.int32), (gl.where(shared, before // SLOTS, own // SLOTS) & 1).to(gl.int32)
