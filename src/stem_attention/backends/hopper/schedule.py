"""Describe which program computes which query block of which head, and in what order. Shared by producer and consumers."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from stem_attention.backends.hopper.gluon_api import either


@gluon.jit
def task_of(ticket, batch):
    """``(sequence, head, tasks from the sequence's end)`` of the ``ticket``-th task.

    The last rows, which may be dense and many times longer than the others, go first: those of all heads and sequences. The
    others go row by row from the end, ``abreast`` heads side by side, as many as have their keys and values in the L2 cache
    together. Where these are not all, heads take turns: ``abreast`` others begin when all rows of those before have begun.
    """
    _, _, _, _, sequences, heads, _, heavy, light, abreast = batch
    every = heads * sequences
    rest = ticket - heavy * every
    row = rest // abreast
    is_heavy = rest < 0
    head = gl.where(is_heavy, ticket % every, row // light * abreast + rest % abreast)
    from_end = gl.where(is_heavy, ticket // every, heavy + row % light)
    return head // heads, head % heads, from_end


@gluon.jit
def place_of(z, from_end, batch, B: gl.constexpr, RAGGED: gl.constexpr, ROWS: gl.constexpr = 1):
    """``(block, row, first position, query's first token, key's first token, kv_len)``; the row is negative where none is.

    Of a task of two rows it is the later one's; the first row of an odd number is alone.
    """
    cu_q, cu_k, q_len, kv_len, _, _, rows, _, _, _ = batch
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
def drawn(queue):
    """The queue's next number, in lane 0 alone; nothing waits for it before :func:`ticket_of`. The producer's part."""
    return gl.inline_asm_elementwise(
        """{
            .reg .pred first;
            .reg .b32 lane;
            mov.u32 lane, %laneid;
            setp.eq.u32 first, lane, 0;
            mov.b32 $0, 0;
            @first atom.global.relaxed.gpu.add.u32 $0, [$1], 1;
        }""",
        "=&r,l",
        [queue.to(gl.int64)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def ticket_of(number, queue, tickets):
    """The ticket that a number of :func:`drawn` stands for."""
    number = gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1
    )
    if number == tickets - 1:  # as many are drawn as there are: nobody asks again, and the next launch finds a new queue
        gl.store(queue, 0)
    return number + gl.num_programs(0)


WORDS: gl.constexpr = gl.constexpr(16)  # that there is room for to tell of a task: a power of two


@gluon.jit
def task_memory():
    """Room for two tasks."""
    return gl.allocate_shared_memory(gl.int32, [2, WORDS], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def task_barriers(consumers: gl.constexpr):
    """Of each of the two, "full", and behind these "empty"."""
    bars = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(4):
        mbarrier.init(bars.index(i), count=1 if i < 2 else consumers)
    return bars


@gluon.jit
def tell(served, task_s, task_bars, z, head, block, row, start, q_first, kv_len, steps0, steps1):
    """Tell the consumers of a task, through one of two slots; the producer's part. A sequence ``z`` below 0 ends all.

    ``steps0`` are those of the first row of two, and ``steps1`` those of the second or only one.
    """
    i = gl.arange(0, WORDS, layout=gl.BlockedLayout([WORDS], [32], [1], [0]))
    words = gl.where(i == 0, z, gl.where(i == 1, head, gl.where(i == 2, block, gl.where(i == 3, row, start))))
    words = gl.where(i == 5, q_first, gl.where(i == 6, kv_len, gl.where(i == 7, steps0, gl.where(i == 8, steps1, words))))
    slot = served % 2
    mbarrier.wait(task_bars.index(2 + slot), ((served // 2) & 1) ^ 1)
    task_s.index(slot).store(words)
    mbarrier.arrive(task_bars.index(slot), count=1)


@gluon.jit
def _word(words, at: gl.constexpr):
    i = gl.arange(0, WORDS, layout=words.type.layout)
    return gl.sum(gl.where(i == at, words, 0), 0)


@gluon.jit
def told(w: gl.constexpr, served, task_s, task_bars):
    """Read what :func:`tell` says of the next task, of steps those of row ``w``; the part of a consumer of four warps."""
    slot = served % 2
    mbarrier.wait(task_bars.index(slot), (served // 2) & 1)
    words = task_s.index(slot).load(gl.BlockedLayout([WORDS], [32], [4], [0]))
    mbarrier.arrive(task_bars.index(2 + slot), count=1)
    z = _word(words, 0)
    head = _word(words, 1)
    block = _word(words, 2)
    row = _word(words, 3)
    start = _word(words, 4)
    q_first = _word(words, 5)
    kv_len = _word(words, 6)
    return z, head, block, row, start, q_first, kv_len, _word(words, 7 + w)


@gluon.jit
def steps_of(z, head, block, row, batch, counts, width, B: gl.constexpr, BN: gl.constexpr):
    """``(list's offset, entries, whole, steps)`` of a row. Nothing has validated the selection: reads stay inside the list."""
    _, _, _, _, _, heads, rows, _, _, _ = batch
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
    taken = gl.where(shared, before, own).to(gl.uint32)
    first = gl.where(shared, 0, SLOTS + w * SLOTS)
    return first + (taken % SLOTS).to(gl.int32), ((taken // SLOTS) & 1).to(gl.int32)
