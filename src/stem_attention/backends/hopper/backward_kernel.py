"""Gradients of keys and values for Hopper: one warp copies, a warpgroup for every 64 keys of a block computes.

A program has one chunk of a key block's list, as the portable ``dkv_kernel`` has, and passes its tiles of 64 queries through a
ring. Scores and weights are transposed, keys by queries, so that the weights and their gradients are the first operands of the
products that the accumulators take, straight from registers: nothing but tiles of inputs is in shared memory.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from stem_attention.backends.hopper.gluon_api import async_load, barriers

LOG2E: gl.constexpr = gl.constexpr(1.4426950408889634)


@gluon.jit
def _open(chunk, columns, shape, G: gl.constexpr):
    """``(column, its sequence, kv head and block, first entry, entries)`` of a chunk; no entries where there is no column."""
    _, starts, owners, firsts, _, longest = columns
    kv_heads, blocks, number = shape
    column = gl.load(owners + chunk)
    exists = column < number
    column = gl.minimum(column, number - 1)
    most = gl.load(longest)
    begin = gl.load(starts + column.to(gl.int64) * G) + (chunk - gl.load(firsts + column)) * most
    count = gl.minimum(gl.load(starts + (column.to(gl.int64) + 1) * G) - begin, most)
    z, kv_head, block = column // (kv_heads * blocks), column // blocks % kv_heads, column % blocks
    return column, z, kv_head, block, begin, gl.where(exists, count, 0), exists


@gluon.jit
def _producer(tiles, shared, columns, shape, rows_of, G: gl.constexpr, WGS: gl.constexpr, D: gl.constexpr,
              SLOTS: gl.constexpr):  # fmt: skip
    SUB: gl.constexpr = WGS
    B: gl.constexpr = 64 * WGS
    q_tiles, k_tiles, v_tiles, do_tiles = tiles
    k_s, v_s, q_s, do_s, norm_s, shift_s, edge_s, kv_full, q_full, do_full, rows_full, empty = shared
    lse, lse_stride_b, lse_stride_h, delta, delta_stride_b, delta_stride_h, q_len, kv_len, rows = rows_of
    lists, _, _, _, _, _ = columns
    _, z, kv_head, block, begin, count, _ = _open(gl.program_id(0), columns, shape, G)
    mbarrier.expect(kv_full.index(0), 2 * B * D * 2)
    for w in gl.static_range(WGS):
        at = [z, block * B + w * 64, kv_head, 0]
        async_load(k_tiles, at, kv_full.index(0), k_s.index(w)._reinterpret(k_s.dtype, [1, 64, 1, D], k_tiles.layout))
        async_load(v_tiles, at, kv_full.index(0), v_s.index(w)._reinterpret(v_s.dtype, [1, 64, 1, D], v_tiles.layout))
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    start = kv_len - q_len
    first_row = start // B
    wide_z = z.to(gl.int64)
    entry = gl.load(lists + begin, mask=count > 0, other=0)
    for t in range(count * SUB):
        head = kv_head * G + entry // rows
        row = first_row + entry % rows
        # Of a tile in the diagonal block, the key that its first query sees last.
        edge = gl.where(row == block, t % SUB * 64, B)
        token = row * B + t % SUB * 64 - start
        tokens = token + gl.arange(0, 64, layout=layout)
        there = (tokens >= 0) & (tokens < q_len)
        wide = head.to(gl.int64)
        # A row that is not there has infinite lse, so weights of 0.
        norm = gl.load(lse + wide_z * lse_stride_b + wide * lse_stride_h + tokens, mask=there, other=float("inf")) * LOG2E
        shift = gl.load(delta + wide_z * delta_stride_b + wide * delta_stride_h + tokens, mask=there, other=0.0)
        entry = gl.load(lists + begin + gl.minimum((t + 1) // SUB, count - 1))
        s = t % SLOTS
        mbarrier.wait(empty.index(s), ((t // SLOTS) & 1) ^ 1)
        mbarrier.expect(q_full.index(s), 64 * D * 2)
        slot = q_s.index(s)._reinterpret(q_s.dtype, [1, 64, 1, D], q_tiles.layout)
        async_load(q_tiles, [z, token, head, 0], q_full.index(s), slot)
        mbarrier.expect(do_full.index(s), 64 * D * 2)
        slot = do_s.index(s)._reinterpret(do_s.dtype, [1, 64, 1, D], do_tiles.layout)
        async_load(do_tiles, [z, token, head, 0], do_full.index(s), slot)
        norm_s.index(s).store(norm)
        shift_s.index(s).store(shift)
        edge_s.index(s).store(gl.full([1], edge, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
        mbarrier.arrive(rows_full.index(s), count=1)


@gluon.jit
def _consumer(w: gl.constexpr, shared, columns, shape, rows_of, results, scale, factor, G: gl.constexpr, WGS: gl.constexpr,
              D: gl.constexpr, SLOTS: gl.constexpr):  # fmt: skip
    SUB: gl.constexpr = WGS
    B: gl.constexpr = 64 * WGS
    k_s, v_s, q_s, do_s, norm_s, shift_s, edge_s, kv_full, q_full, do_full, rows_full, empty = shared
    _, _, _, _, _, _, _, kv_len, _ = rows_of
    d_k, d_v, sums_k, sums_v, dk_stride_b, dk_stride_s, dk_stride_h, dv_stride_b, dv_stride_s, dv_stride_h = results
    _, _, _, firsts, slots, _ = columns
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    held_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    across: gl.constexpr = gl.SliceLayout(0, scores_layout)
    dtype: gl.constexpr = q_s.dtype
    chunk = gl.program_id(0)
    column, z, kv_head, block, _, count, exists = _open(chunk, columns, shape, G)
    blank = gl.zeros([64, 64], gl.float32, scores_layout)
    sum_k = gl.zeros([64, D], gl.float32, out_layout)
    sum_v = gl.zeros([64, D], gl.float32, out_layout)
    k_tile, v_tile = k_s.index(w), v_s.index(w)
    mbarrier.wait(kv_full.index(0), 0)
    for t in range(count * SUB):
        s = t % SLOTS
        phase = (t // SLOTS) & 1
        mbarrier.wait(q_full.index(s), phase)
        scores = warpgroup_mma(k_tile, q_s.index(s).permute((1, 0)), blank, use_acc=False, is_async=True)
        mbarrier.wait(do_full.index(s), phase)
        d_weights = warpgroup_mma(v_tile, do_s.index(s).permute((1, 0)), blank, use_acc=False, is_async=True)
        mbarrier.wait(rows_full.index(s), phase)
        scores = warpgroup_mma_wait(1, deps=[scores])
        scores = scores * factor - norm_s.index(s).load(across)[None, :]
        edge = gl.max(edge_s.index(s).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
        if edge < B:
            places = w * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, scores_layout))
            queries = edge + gl.arange(0, 64, layout=across)
            scores = gl.where(queries[None, :] >= places[:, None], scores, -float("inf"))
        weights = gl.exp2(scores)
        sum_v = warpgroup_mma(gl.convert_layout(weights.to(dtype), held_layout), do_s.index(s), sum_v, is_async=True)
        d_weights = warpgroup_mma_wait(1, deps=[d_weights])
        d_scores = weights * (d_weights - shift_s.index(s).load(across)[None, :])
        sum_k = warpgroup_mma(gl.convert_layout(d_scores.to(dtype), held_layout), q_s.index(s), sum_k, is_async=True)
        # ptxas lets no product run on into the next turn of a loop: it would wait for each one by itself.
        sum_k, sum_v = warpgroup_mma_wait(0, deps=[sum_k, sum_v])
        mbarrier.arrive(empty.index(s), count=1)
    if exists:
        lines = w * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, out_layout))
        dims = gl.arange(0, D, layout=gl.SliceLayout(0, out_layout))
        slot = gl.load(slots + column)
        sum_k = sum_k * scale
        if slot < 0:
            tokens = block * B + lines
            own_k = d_k + z.to(gl.int64) * dk_stride_b + kv_head.to(gl.int64) * dk_stride_h
            own_v = d_v + z.to(gl.int64) * dv_stride_b + kv_head.to(gl.int64) * dv_stride_h
            wide = tokens.to(gl.int64)[:, None]
            gl.store(own_k + wide * dk_stride_s + dims[None, :], sum_k.to(dtype), mask=(tokens < kv_len)[:, None])
            gl.store(own_v + wide * dv_stride_s + dims[None, :], sum_v.to(dtype), mask=(tokens < kv_len)[:, None])
        else:
            number = chunk - gl.load(firsts + column)
            line = (slot + number).to(gl.int64) * (B * D)
            places = (lines * D)[:, None] + dims[None, :]
            gl.store(sums_k + line + places, sum_k)
            gl.store(sums_v + line + places, sum_v)


@gluon.jit
def _first(shared, columns, shape, rows_of, results, scale, factor, G: gl.constexpr, WGS: gl.constexpr, D: gl.constexpr,
           SLOTS: gl.constexpr):  # fmt: skip
    """Keys 0 to 63 of the block."""
    _consumer(0, shared, columns, shape, rows_of, results, scale, factor, G, WGS, D, SLOTS)


@gluon.jit
def _second(shared, columns, shape, rows_of, results, scale, factor, G: gl.constexpr, WGS: gl.constexpr, D: gl.constexpr,
            SLOTS: gl.constexpr):  # fmt: skip
    """Keys 64 to 127."""
    _consumer(1, shared, columns, shape, rows_of, results, scale, factor, G, WGS, D, SLOTS)


@gluon.jit(do_not_specialize=["q_len", "kv_len", "rows", "blocks", "columns", "lse_stride_b", "lse_stride_h",
                              "delta_stride_b", "delta_stride_h"])  # fmt: skip
def dkv_kernel(
    q_tiles, k_tiles, v_tiles, do_tiles, lse, delta, d_k, d_v, sums_k, sums_v, lists, starts, owners, firsts, slots, longest,
    dk_stride_b, dk_stride_s, dk_stride_h, dv_stride_b, dv_stride_s, dv_stride_h, lse_stride_b, lse_stride_h, delta_stride_b,
    delta_stride_h, q_len, kv_len, kv_heads, rows, blocks, columns, scale, factor,
    G: gl.constexpr, WGS: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Gradients of one key block's keys and values, over one chunk of the rows that keep it."""
    dtype: gl.constexpr = q_tiles.dtype
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    row_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_s = gl.allocate_shared_memory(dtype, [WGS, 64, D], tile_layout)
    v_s = gl.allocate_shared_memory(dtype, [WGS, 64, D], tile_layout)
    q_s = gl.allocate_shared_memory(dtype, [SLOTS, 64, D], tile_layout)
    do_s = gl.allocate_shared_memory(dtype, [SLOTS, 64, D], tile_layout)
    norm_s = gl.allocate_shared_memory(gl.float32, [SLOTS, 64], row_layout)
    shift_s = gl.allocate_shared_memory(gl.float32, [SLOTS, 64], row_layout)
    edge_s = gl.allocate_shared_memory(gl.int32, [SLOTS, 1], row_layout)
    kv_full = barriers(1, 1)
    q_full = barriers(SLOTS, 1)
    do_full = barriers(SLOTS, 1)
    rows_full = barriers(SLOTS, 1)
    empty = barriers(SLOTS, WGS)
    fence_async_shared()
    tiles = (q_tiles, k_tiles, v_tiles, do_tiles)
    shared = (k_s, v_s, q_s, do_s, norm_s, shift_s, edge_s, kv_full, q_full, do_full, rows_full, empty)
    lists_of = (lists, starts, owners, firsts, slots, longest)
    shape = (kv_heads, blocks, columns)
    rows_of = (lse, lse_stride_b, lse_stride_h, delta, delta_stride_b, delta_stride_h, q_len, kv_len, rows)
    results = (d_k, d_v, sums_k, sums_v, dk_stride_b, dk_stride_s, dk_stride_h, dv_stride_b, dv_stride_s, dv_stride_h)
    if WGS == 2:
        gl.warp_specialize([
            (_first, (shared, lists_of, shape, rows_of, results, scale, factor, G, WGS, D, SLOTS)),
            (_second, (shared, lists_of, shape, rows_of, results, scale, factor, G, WGS, D, SLOTS)),
            (_producer, (tiles, shared, lists_of, shape, rows_of, G, WGS, D, SLOTS)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_first, (shared, lists_of, shape, rows_of, results, scale, factor, G, WGS, D, SLOTS)),
            (_producer, (tiles, shared, lists_of, shape, rows_of, G, WGS, D, SLOTS)),
        ], [1], [24])  # fmt: skip
