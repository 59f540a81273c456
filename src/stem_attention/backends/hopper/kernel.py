"""Block-sparse attention forward for Hopper: one warp copies, one or two warpgroups of 64 query rows compute.

Tile: a query block of 128 (two warpgroups) or 64 (one) against ``BN`` keys, a block or half of one. Pipeline: the producer
fetches queries once per task, and keys and values into rings of ``SLOTS`` by the copy engine; consumers issue the scores of a
tile together with the weighted values of the tile before, and their softmax runs beside the latter. Two warpgroups take turns
in issuing. Of keys of 192 the first ``D`` columns, the dimension of values, lie in one buffer and the ``REST`` in
another. Persistent programs take tasks from a queue, long rows first. docs/kernels.md has the speeds.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from stem_attention.backends.hopper.consumer import first_consumer, second_consumer
from stem_attention.backends.hopper.gluon_api import barriers
from stem_attention.backends.hopper.launch import VARYING
from stem_attention.backends.hopper.producer import producer
from stem_attention.backends.hopper.schedule import task_barriers, task_memory


@gluon.jit(do_not_specialize=VARYING)
def attention_kernel(
    q_tiles, k_tiles, v_tiles, o_tiles, out, lse, sinks, indices, counts, cu_q, cu_k, page_table, queue,
    o_stride_s, o_stride_h, lse_stride_b, lse_stride_h, table_stride, page_count,
    q_len, kv_len, sequences, heads, rows, heavy, light, abreast, width, tickets, group, scale, steepness,
    WGS: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr, PAGE: gl.constexpr, RAGGED: gl.constexpr,
    LSE: gl.constexpr, BOX: gl.constexpr, QREG: gl.constexpr, REST: gl.constexpr,
):  # fmt: skip
    """``sinks`` are ``(heads,)`` or None, ``scale`` and ``steepness`` as the portable kernel has them; see ``attention.py``."""
    dtype: gl.constexpr = q_tiles.dtype
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_s = gl.allocate_shared_memory(dtype, [WGS, 64, D], tile_layout)
    k_s = gl.allocate_shared_memory(dtype, [SLOTS, BN, D], tile_layout)
    # Tensors of Gluon are powers of two.
    q_rest = gl.allocate_shared_memory(dtype, [WGS, 64, REST], tile_layout) if REST else q_s
    k_rest = gl.allocate_shared_memory(dtype, [SLOTS, BN, REST], tile_layout) if REST else k_s
    v_s = gl.allocate_shared_memory(dtype, [SLOTS, BN, D], tile_layout)
    task_s = task_memory()
    k_full = barriers(SLOTS, 1)
    v_full = barriers(SLOTS, 1)
    k_empty = barriers(SLOTS, WGS)
    v_empty = barriers(SLOTS, WGS)
    q_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_bars.index(0), count=1)
    mbarrier.init(q_bars.index(1), count=WGS)
    task_bars = task_barriers(WGS)
    # A barrier that nothing waits for must not be there: Triton sees its memory unused and puts the atomic's ticket there,
    # which PTX forbids without mbarrier.inval. The ticket was lost now and then, and with it a row.
    turns = barriers(2, 1) if WGS == 2 else q_bars
    fence_async_shared()

    tiles = (q_tiles, k_tiles, v_tiles, o_tiles)
    shared = (q_s, k_s, v_s, task_s, k_full, v_full, k_empty, v_empty, q_bars, task_bars, turns, q_rest, k_rest)
    batch = (cu_q, cu_k, q_len, kv_len, sequences, heads, rows, heavy, light, abreast)
    lists = (indices, counts, width, tickets, group)
    pages = (page_table, table_stride, page_count)
    scales = (scale, steepness)
    results = (out, o_stride_s, o_stride_h, lse, lse_stride_b, lse_stride_h, sinks)
    # Triton keeps constants constant only where they are arguments of the call itself.
    if WGS == 2:
        gl.warp_specialize([
            (first_consumer, (tiles, shared, batch, lists, results, scales, WGS, BN, D, SLOTS, RAGGED, LSE, QREG, REST)),
            (second_consumer, (tiles, shared, batch, lists, results, scales, WGS, BN, D, SLOTS, RAGGED, LSE, QREG, REST)),
            (producer, (tiles, shared, batch, lists, pages, queue, WGS, BN, D, SLOTS, PAGE, RAGGED, BOX, REST)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (first_consumer, (tiles, shared, batch, lists, results, scales, WGS, BN, D, SLOTS, RAGGED, LSE, QREG, REST)),
            (producer, (tiles, shared, batch, lists, pages, queue, WGS, BN, D, SLOTS, PAGE, RAGGED, BOX, REST)),
        ], [1], [24])  # fmt: skip
