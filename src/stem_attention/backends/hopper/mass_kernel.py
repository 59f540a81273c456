"""The kernel that keeps by mass, for Hopper: one warp copies, two warpgroups of 64 query pools each compute.

Tile: 128 query pools of a head against ``BN`` key pools. Pipeline: the producer fetches the queries' means once, then the means
of all keys that they see, and then these again with the variances, through one ring of ``SLOTS``. The warpgroups never wait
for each other: one's products run beside the other's softmax, and beside those of the program that shares the multiprocessor.
What is computed, and in which order, is in the portable kernel, ``backends/triton/mass_kernels.py``.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from stem_attention.backends.hopper.gluon_api import async_load, either


@gluon.jit
def _fetch(tiles, ring, full, s, outer, position, rows: gl.constexpr, D: gl.constexpr):
    async_load(tiles, [outer, position, 0], full, ring.index(s)._reinterpret(ring.dtype, [1, rows, D], tiles.layout))


@gluon.jit
def _producer(tiles, shared, place, BN: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr, SPREAD: gl.constexpr):
    """Fill the queries' memory, and the ring twice over."""
    q_tiles, k_tiles, v_tiles = tiles
    q_s, _, k_s, v_s, full, empty, q_full = shared
    q_outer, k_outer, pool, steps = place
    mbarrier.expect(q_full.index(0), 2 * 64 * D * 2)
    for w in gl.static_range(2):
        _fetch(q_tiles, q_s, q_full.index(0), w, q_outer, pool + w * 64, 64, D)
    for t in range(0, 2 * steps):
        s = t % SLOTS
        mbarrier.wait(empty.index(s), ((t // SLOTS) & 1) ^ 1)
        position = t % steps * BN
        if SPREAD and t >= steps:
            mbarrier.expect(full.index(s), 2 * BN * D * 2)
            _fetch(v_tiles, v_s, full.index(s), s, k_outer, position, BN, D)
        else:
            mbarrier.expect(full.index(s), BN * D * 2)
        _fetch(k_tiles, k_s, full.index(s), s, k_outer, position, BN, D)


@gluon.jit
def _capped(scores, cap):
    """Scores under a cap, which is None for none; both in base 2."""
    return scores if cap is None else cap * (1.0 - 2.0 / (gl.exp2(scores / cap * 2.8853900817779268) + 1.0))


@gluon.jit
def _at_the_edge(logits, n0, last, kv_len, short, KP: gl.constexpr, BN: gl.constexpr):
    """Logits where a pool may begin after a query's ``last`` key, or be the last one and weigh ``short`` less (in base 2)."""
    n = n0 + gl.arange(0, BN, layout=gl.SliceLayout(0, logits.type.layout))
    logits += gl.where(n == kv_len // KP, short, 0.0)[None, :]
    return gl.where(n[None, :] * KP <= last[:, None], logits, -float("inf"))


@gluon.jit
def _below(n):
    """The lowest ``n`` of 32 bits."""
    n = gl.minimum(gl.maximum(n, 0), 32).to(gl.int64)
    return ((1 << n) - 1).to(gl.uint32)


@gluon.jit
def _ones(words):
    """How many of 32 bits are set; LLVM knows this idiom."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return ((words * 0x01010101) >> 24).to(gl.int32)


@gluon.jit
def _bits(columns: gl.constexpr, layout: gl.constexpr):
    return gl.full([columns], 1, gl.uint32, layout) << gl.arange(0, columns, layout=layout).to(gl.uint32)


@gluon.jit
def _noticed(weights, least, per_row: gl.constexpr):
    """Words with a bit for each block, of 32 at most, that a pool of the row notices. NaN is not less, and so is noticed."""
    layout: gl.constexpr = weights.type.layout
    columns: gl.constexpr = weights.shape[1]
    bits = _bits(columns, gl.SliceLayout(0, layout))
    least = gl.convert_layout(least, gl.SliceLayout(1, layout))
    words = gl.sum(gl.where(weights < least[:, None], gl.zeros_like(bits)[None, :], bits[None, :]), 1).to(gl.uint32)
    return gl.reduce(words.reshape([weights.shape[0] // per_row, per_row]), 1, either)


@gluon.jit
def _keeper(
    w: gl.constexpr, shared, place, rows_of, lists, numbers, B: gl.constexpr, QP: gl.constexpr, KP: gl.constexpr,
    SINK: gl.constexpr, LOCAL: gl.constexpr, TAIL: gl.constexpr, IMPLICIT: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
    SLOTS: gl.constexpr, SPREAD: gl.constexpr,
):  # fmt: skip
    """Write the lists of the ``w``-th 64 query pools of a tile."""
    per_row: gl.constexpr = B // QP
    per_column: gl.constexpr = B // KP
    columns: gl.constexpr = BN // per_column
    tile_rows: gl.constexpr = 64 // per_row
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    pools: gl.constexpr = gl.SliceLayout(1, scores_layout)
    list_layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    listing: gl.constexpr = gl.SliceLayout(1, list_layout)
    q_s, squares_s, k_s, v_s, full, empty, q_full = shared
    _, _, _, steps = place
    row0, block0, rows, start, kv_len, prompt = rows_of
    ids, counts, width, kept = lists
    share, scale, spread, cap = numbers

    block0 += w * tile_rows
    edge = gl.minimum(block0 * (B // KP), (kv_len + KP - 1) // KP) // BN * BN
    first = block0 * B + gl.arange(0, 64, layout=pools) * QP
    last = gl.minimum(first + QP, kv_len) - 1
    # A pool without queries of this call notices nothing.
    least = gl.where((first + QP > start) & (first < kv_len), share / gl.maximum(prompt, 1), float("inf"))
    rest = kv_len % KP
    short = gl.log2(gl.where(rest > 0, rest, KP).to(gl.float32) / KP)
    row = row0 + w * tile_rows + gl.arange(0, tile_rows, layout=listing)
    block = block0 + gl.arange(0, tile_rows, layout=listing)
    exists = (row < rows) & (block * B < kv_len) & (start < kv_len)
    whole = block >= prompt - TAIL
    listed = exists & (whole == 0) if IMPLICIT else exists
    ids += (row0 + w * tile_rows).to(gl.int64) * width
    entries = gl.arange(0, tile_rows, layout=listing) * width
    column = gl.arange(0, columns, layout=gl.SliceLayout(0, list_layout))
    bits = _bits(columns, gl.SliceLayout(0, list_layout))

    queries = q_s.index(w)
    squares = squares_s.index(w)
    mbarrier.wait(q_full.index(0), 0)
    if SPREAD:
        means = queries.load(gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [4, 1], [1, 0])).to(gl.float32)
        squares.store((means * means).to(squares.dtype))
        fence_async_shared()
    blank = gl.zeros([64, BN], gl.float32, scores_layout)
    peak = gl.full([64], -float("inf"), gl.float32, pools)
    total = gl.zeros([64], gl.float32, pools)
    for t in range(0, steps):
        s = t % SLOTS
        mbarrier.wait(full.index(s), (t // SLOTS) & 1)
        scores = warpgroup_mma(queries, k_s.index(s).permute((1, 0)), blank, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(empty.index(s), count=1)
        logits = _capped(scores * scale, cap)
        if t * BN >= edge:
            logits = _at_the_edge(logits, t * BN, last, kv_len, short, KP, BN)
        higher = gl.maximum(peak, gl.max(logits, 1))
        total = total * gl.exp2(peak - higher) + gl.sum(gl.exp2(logits - higher[:, None]), 1)
        peak = higher
    level = peak + gl.log2(total)

    count = gl.zeros([tile_rows], gl.int32, listing)
    for t in range(steps, 2 * steps):
        s = t % SLOTS
        mbarrier.wait(full.index(s), (t // SLOTS) & 1)
        scores = warpgroup_mma(queries, k_s.index(s).permute((1, 0)), blank, use_acc=False, is_async=True)
        if SPREAD:
            above = warpgroup_mma(squares, v_s.index(s).permute((1, 0)), blank, use_acc=False, is_async=True)
            scores, above = warpgroup_mma_wait(0, deps=[scores, above])
            mbarrier.arrive(empty.index(s), count=1)
            logits = scores * scale + gl.sqrt(above) * spread
        else:
            scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(empty.index(s), count=1)
            logits = scores * scale
        logits = _capped(logits, cap) - level[:, None]
        n0 = (t - steps) * BN
        if n0 >= edge:
            logits = _at_the_edge(logits, n0, last, kv_len, short, KP, BN)
        words = _noticed(gl.sum(gl.exp2(logits).reshape([64, columns, per_column]), 2), least, per_row)
        words = gl.convert_layout(words, listing)
        j0 = n0 // per_column
        local = _below(block - LOCAL + 1 - j0) ^ 0xFFFFFFFF
        words |= _below(SINK - j0) | local | gl.where(whole, 0xFFFFFFFF, 0).to(gl.uint32)
        words &= _below(gl.minimum(block + 1 - j0, columns))
        slot = count[:, None] + _ones(words[:, None] & (bits - 1)[None, :])
        count += _ones(words)
        mask = ((gl.where(listed, words, 0)[:, None] & bits[None, :]) != 0) & (slot < width)
        gl.store(ids + entries[:, None] + slot, gl.zeros_like(slot) + (j0 + column)[None, :], mask=mask)
    count = gl.where(exists, count, 0)
    gl.store(counts + row, count, mask=row < rows)
    if kept is not None:
        gl.atomic_add(kept, gl.sum(count.to(gl.int64), 0), sem="relaxed")
    if not IMPLICIT:
        for first_slot in range(0, width, columns):
            slot = (first_slot + column)[None, :]
            mask = (row < rows)[:, None] & (slot >= count[:, None]) & (slot < width)
            gl.store(ids + entries[:, None] + slot, gl.full([tile_rows, columns], -1, gl.int32, list_layout), mask=mask)


@gluon.jit
def _first_keeper(
    shared, place, rows_of, lists, numbers, B: gl.constexpr, QP: gl.constexpr, KP: gl.constexpr, SINK: gl.constexpr,
    LOCAL: gl.constexpr, TAIL: gl.constexpr, IMPLICIT: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr,
    SPREAD: gl.constexpr,
):  # fmt: skip
    _keeper(0, shared, place, rows_of, lists, numbers, B, QP, KP, SINK, LOCAL, TAIL, IMPLICIT, BN, D, SLOTS, SPREAD)


@gluon.jit
def _second_keeper(
    shared, place, rows_of, lists, numbers, B: gl.constexpr, QP: gl.constexpr, KP: gl.constexpr, SINK: gl.constexpr,
    LOCAL: gl.constexpr, TAIL: gl.constexpr, IMPLICIT: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr,
    SPREAD: gl.constexpr,
):  # fmt: skip
    _keeper(1, shared, place, rows_of, lists, numbers, B, QP, KP, SINK, LOCAL, TAIL, IMPLICIT, BN, D, SLOTS, SPREAD)


@gluon.jit(do_not_specialize=["prompts", "q_len", "kv_len", "first_row", "rows", "total_rows", "width"])
def keep_kernel(
    q_tiles, k_tiles, v_tiles, indices, counts, prompts, cu_q, cu_k, q_len, kv_len, first_row, rows, total_rows, width, share,
    head_shares, kept, scale, spread, cap, B: gl.constexpr, QP: gl.constexpr, KP: gl.constexpr, G: gl.constexpr,
    SINK: gl.constexpr, LOCAL: gl.constexpr, TAIL: gl.constexpr, IMPLICIT: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
    SLOTS: gl.constexpr, SPREAD: gl.constexpr, RAGGED: gl.constexpr, ONE_LENGTH: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Arguments as those of the portable kernel; tiles are of ``(sequences * heads, pools, dim)``."""
    per_row: gl.constexpr = B // QP
    tile_rows: gl.constexpr = 128 // per_row
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_s = gl.allocate_shared_memory(q_tiles.dtype, [2, 64, D], tile_layout)
    k_s = gl.allocate_shared_memory(k_tiles.dtype, [SLOTS, BN, D], tile_layout)
    if SPREAD:
        squares_s = gl.allocate_shared_memory(v_tiles.dtype, [2, 64, D], tile_layout)
        v_s = gl.allocate_shared_memory(v_tiles.dtype, [SLOTS, BN, D], tile_layout)
    else:
        squares_s = q_s
        v_s = k_s
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    mbarrier.init(q_full.index(0), count=1)
    fence_async_shared()

    # The last rows see the most keys: those of all heads begin first. So their key pools have to fit the L2 cache together.
    head = gl.program_id(0)
    heads = gl.num_programs(0)
    row0 = (gl.num_programs(1) - 1 - gl.program_id(1)) * tile_rows
    z = gl.program_id(2)
    if RAGGED:
        q_len = gl.load(cu_q + z + 1) - gl.load(cu_q + z)
        kv_len = gl.load(cu_k + z + 1) - gl.load(cu_k + z)
    start = kv_len - q_len
    block0 = start // B + first_row + row0
    if not ONE_LENGTH:
        prompts = gl.load(prompts + z)
    if head_shares is not None:
        share = gl.load(head_shares + head)
    seen = gl.minimum((block0 + tile_rows) * (B // KP), (kv_len + KP - 1) // KP)
    seen = gl.where((block0 * B < kv_len) & (q_len > 0), seen, 0)
    at = (z.to(gl.int64) * heads + head) * total_rows + first_row

    tiles = (q_tiles, k_tiles, v_tiles)
    shared = (q_s, squares_s, k_s, v_s, full, empty, q_full)
    place = (z * heads + head, (z * heads + head) // G, row0 * per_row, (seen + BN - 1) // BN)
    rows_of = (row0, block0, rows, start, kv_len, prompts)
    lists = (indices + at * width, counts + at, width, kept)
    numbers = (share, scale, spread, cap)
    gl.warp_specialize([
        (_first_keeper, (shared, place, rows_of, lists, numbers, B, QP, KP, SINK, LOCAL, TAIL, IMPLICIT, BN, D, SLOTS,
                         SPREAD)),
        (_second_keeper, (shared, place, rows_of, lists, numbers, B, QP, KP, SINK, LOCAL, TAIL, IMPLICIT, BN, D, SLOTS,
                          SPREAD)),
        (_producer, (tiles, shared, place, BN, D, SLOTS, SPREAD)),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip
