"""Block-sparse attention forward for Hopper in blocks of 64: two neighbouring query rows of a head share what both keep.

Tile: two rows of 64 queries, a warpgroup each, against a block of 64 keys at a time. Each row's list is walked as it is, from
the diagonal down, so a row's bits do not depend on its neighbour. Blocks of both lists are fetched once, into rings of keys
and values that both warpgroups read. Those of one list alone go into rings of its own, so that neither warpgroup has to look
at what it has not kept. The producer merges the lists, 32 blocks at a time, and tells each warpgroup which are shared.

Pipeline: a warpgroup issues the scores of its next tile and takes the exponentials of the present one beside them; then it
issues the weighted values of the present tile and looks for the next one's maximum beside those. docs/kernels.md has speeds.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from stem_attention.backends.hopper.gluon_api import barriers
from stem_attention.backends.hopper.launch import VARYING
from stem_attention.backends.hopper.pair_consumer import first_of_pair, second_of_pair
from stem_attention.backends.hopper.pair_producer import pair_producer
from stem_attention.backends.hopper.schedule import task_barriers, task_memory

PLANS: gl.constexpr = gl.constexpr(4)  # of a row that may wait to be read


@gluon.jit
def _empty_barriers(SLOTS: gl.constexpr):
    """Of the ring that both rows read, and behind it of each row's own."""
    bars = gl.allocate_shared_memory(gl.int64, [3 * SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(3 * SLOTS):
        mbarrier.init(bars.index(i), count=2 if i < SLOTS else 1)
    return bars


@gluon.jit(do_not_specialize=VARYING)
def pair_kernel(
    q_tiles, k_tiles, v_tiles, o_tiles, out, lse, sinks, indices, counts, cu_q, cu_k, page_table, queue,
    o_stride_s, o_stride_h, lse_stride_b, lse_stride_h, table_stride, page_count,
    q_len, kv_len, sequences, heads, rows, heavy, light, abreast, width, tickets, group, scale, steepness,
    D: gl.constexpr, SLOTS: gl.constexpr, PAGE: gl.constexpr, RAGGED: gl.constexpr, LSE: gl.constexpr, BOX: gl.constexpr,
):  # fmt: skip
    """The arguments are those of ``kernel.py``'s. ``SLOTS`` are those of every ring, at least two."""
    dtype: gl.constexpr = q_tiles.dtype
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_s = gl.allocate_shared_memory(dtype, [2, 64, D], tile_layout)
    k_s = gl.allocate_shared_memory(dtype, [3 * SLOTS, 64, D], tile_layout)
    v_s = gl.allocate_shared_memory(dtype, [3 * SLOTS, 64, D], tile_layout)
    word: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    task_s = task_memory()
    plan_s = gl.allocate_shared_memory(gl.int32, [4 * PLANS, 1], word)
    k_full = barriers(3 * SLOTS, 1)
    v_full = barriers(3 * SLOTS, 1)
    k_empty = _empty_barriers(SLOTS)
    v_empty = _empty_barriers(SLOTS)
    # Of two rows each: "full" and "empty".
    q_bars = barriers(4, 1)
    plan_bars = barriers(4 * PLANS, 1)
    task_bars = task_barriers(2)
    fence_async_shared()

    tiles = (q_tiles, k_tiles, v_tiles)
    shared = (q_s, k_s, v_s, task_s, plan_s, k_full, v_full, k_empty, v_empty, q_bars, task_bars, plan_bars)
    batch = (cu_q, cu_k, q_len, kv_len, sequences, heads, rows, heavy, light, abreast)
    lists = (indices, counts, width, tickets, group)
    pages = (page_table, table_stride, page_count)
    scales = (scale, steepness)
    results = (out, o_stride_s, o_stride_h, lse, lse_stride_b, lse_stride_h, sinks)
    gl.warp_specialize([
        (first_of_pair, (shared, results, scales, D, SLOTS, PLANS, RAGGED, LSE)),
        (second_of_pair, (shared, results, scales, D, SLOTS, PLANS, RAGGED, LSE)),
        (pair_producer, (tiles, shared, batch, lists, pages, queue, D, SLOTS, PLANS, PAGE, RAGGED, BOX)),
    ], [4, 1], [224, 56])  # fmt: skip
