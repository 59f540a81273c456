"""Launch of the selection by mass: statistics of pools of keys and queries, and one kernel from there to the lists."""

import math

import torch
import triton
from torch import Tensor

from stem_attention.backends.triton.launch import architecture, tile_launch
from stem_attention.backends.triton.layout import Layout
from stem_attention.backends.triton.mass_kernels import keep_kernel, pool_kernel
from stem_attention.backends.triton.program import Launches
from stem_attention.backends.triton.tables import device_table, kept_per_stream
from stem_attention.blocks import block_count
from stem_attention.call import Call, PackedBatch, to_device
from stem_attention.policies.mass import Mass

_LOG2E = math.log2(math.e)


def select_by_mass(call: Call, layout: Layout, dense_below: int, implicit: bool, launches: Launches) -> tuple[Tensor, Tensor]:
    """Choose the blocks that :class:`Mass` keeps; see :data:`stem_attention.backends.triton.backend.Selector`."""
    policy, q, k, packed = call.policy, call.q, call.k, layout.packed
    assert isinstance(policy, Mass)
    size, heads, dim, padded = policy.block_size, layout.heads, layout.dim, triton.next_power_of_2(layout.dim)
    prompts: Tensor | int
    if call.batch is None:
        prompts = block_count(call.prompt_len, size)
        width = _list_width(policy, prompts, False, layout.first, layout.blocks, implicit)
    else:
        prompts, width = _prompts(call.batch, policy, dense_below, implicit, layout.blocks)
        launches.keep(prompts)
    indices = launches.empty((layout.batch, heads, layout.rows, width), torch.int32, q.device)
    counts = launches.empty((layout.batch, heads, layout.rows), torch.int32, q.device)
    if layout.rows == 0:
        return indices, counts
    per_row, per_column, spread = size // policy.query_pool, size // policy.key_pool, policy.spread > 0
    keys = launches.empty((layout.batch, layout.kv_heads, layout.blocks, per_column, dim), k.dtype, k.device)
    # The interpreter, on a CPU, computes bfloat16 wrongly.
    kind = torch.float32 if k.device.type == "cpu" or k.dtype == torch.float32 else torch.bfloat16
    variances = launches.empty(keys.shape, kind, k.device) if spread else keys
    tile = tile_launch("mass", architecture(q.device))
    # A tile holds whole blocks, also where a block has more pools than the tile was measured with; and no more keys or blocks
    # than its registers and shared memory do.
    tile_rows = max(tile.rows, per_row)
    tile_columns = max(min(tile.columns * 128 // max(128, padded), 32 * per_column), per_column)
    factor, cap = call.scale * _LOG2E, None if call.softcap is None else call.softcap * _LOG2E
    step = layout.rows_at_once(per_row * dim * (q.element_size() + variances.element_size()), tile_rows // per_row)
    shares = _head_shares(q.device, policy, heads) if policy.head_factors is not None else None
    launches.keep(shares, call.kept)
    means = launches.empty((layout.batch, heads, step, per_row, dim), q.dtype, q.device)
    squares = launches.empty(means.shape, kind, q.device) if spread else means
    for first in range(0, layout.rows, step):
        rows = min(step, layout.rows - first)
        key_blocks = layout.blocks * layout.kv_heads if first == 0 else 0  # keys are pooled once, with the first queries
        launches.start(
            pool_kernel, (rows * heads + key_blocks, layout.batch),
            q, means, squares, k, keys, variances, layout.cu_q, layout.cu_k, layout.page_table, *layout.q_strides,
            *layout.k_strides, layout.table_stride, k.shape[0], layout.q_len, layout.kv_len, first, rows, layout.blocks, heads,
            layout.kv_heads, B=size, QP=policy.query_pool, KP=policy.key_pool, D=dim, BD=padded, SPREAD=spread, RAGGED=packed,
            PAGE=layout.page,
            num_warps=max(1, max(policy.query_pool, policy.key_pool) * padded // 4096),  # so few were by far the fastest
        )  # fmt: skip
        launches.start(
            keep_kernel, (triton.cdiv(rows, tile_rows // per_row), heads, layout.batch),
            means, squares, keys, variances, indices, counts, prompts, layout.cu_q, layout.cu_k, layout.q_len, layout.kv_len,
            first, rows, layout.rows, layout.blocks, width, policy.share, shares, call.kept, factor,
            policy.spread * abs(factor), cap, B=size, QP=policy.query_pool, KP=policy.key_pool, G=layout.group,
            SINK=policy.sink_blocks, LOCAL=policy.local_blocks, TAIL=policy.tail_blocks, IMPLICIT=implicit, BM=tile_rows,
            BN=tile_columns, D=dim, BD=padded, SPREAD=spread, RAGGED=packed, ONE_LENGTH=call.batch is None,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return indices, counts


def _list_width(policy: Mass, blocks: int, dense: bool, first: int, end: int, implicit: bool) -> int:
    """The longest list that must be written for rows ``first`` to ``end`` of a prompt of ``blocks`` blocks."""
    unlisted = (blocks if dense else policy.tail_blocks) if implicit else 0
    last = min(end, blocks - unlisted)
    return last if last > first else 1


def _prompts(batch: PackedBatch, policy: Mass, dense_below: int, implicit: bool, end: int) -> tuple[Tensor, int]:
    """int32 ``(sequences,)``, the blocks of each prompt, 0 for a dense one, and the longest list: the same for all layers."""
    size = policy.block_size

    def make() -> tuple[Tensor, int]:
        prompts = [(block_count(length, size), length < dense_below) for length in batch.prompt_lens]
        table = to_device([0 if dense else blocks for blocks, dense in prompts], torch.int32, batch.cu_q.device)
        return table, max(_list_width(policy, *prompt, 0, end, implicit) for prompt in prompts)

    return batch.once(("prompts", size, policy.tail_blocks, dense_below, implicit), make)


@kept_per_stream
def _head_shares(device: torch.device, policy: Mass, heads: int) -> Tensor:
    """fp32 ``(1, heads)``."""
    return device_table([[policy.head_share(head) for head in range(heads)]], torch.float32, device)
