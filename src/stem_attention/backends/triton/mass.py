"""Launch of the selection by mass: statistics of pools of keys and queries, and one kernel from there to the lists."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

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


@dataclass(frozen=True)
class Keeping:
    """Pools of a call that a kernel turns into lists, and the run of its rows that have been pooled.

    Attributes:
        policy: The call's.
        layout: Where the call's tensors lie.
        means: Of the queries, ``(batch, heads, rows, pools of a row, dim)``, of which there may be room for more rows.
        keys: Means of the keys, ``(batch, kv_heads, blocks, pools of a block, dim)``.
        variances: Likewise; without a spread ``keys`` again.
        lists: Indices and counts, as the call returns them.
        prompts: Blocks of the whole prompt: a number, or one for each sequence, 0 for one that keeps everything.
        shares: A share for each head, or None for the policy's.
        kept: Counts kept blocks, or None.
        scales: The softmax scale, the spread and the soft cap, each times log2(e); the cap may be None.
        implicit: Whether rows that keep everything go without a list.
        first: First row of the run.
        rows: Rows of the run.
    """

    policy: Mass
    layout: Layout
    means: Tensor
    keys: Tensor
    variances: Tensor
    lists: tuple[Tensor, Tensor]
    prompts: Tensor | int
    shares: Tensor | None
    kept: Tensor | None
    scales: tuple[float, float, float | None]
    implicit: bool
    first: int
    rows: int


Keeper: TypeAlias = Callable[[Keeping, Launches], None]


def keep(run: Keeping, launches: Launches) -> None:
    """Start the portable kernel that turns pools into lists."""
    policy, layout, width = run.policy, run.layout, run.lists[0].shape[3]
    tile = tile_launch("mass", architecture(run.means.device))
    padded, per_column = triton.next_power_of_2(layout.dim), policy.block_size // policy.key_pool
    # A tile has no more keys or blocks than its registers and shared memory do, and whole blocks.
    columns = max(min(tile.columns * 128 // max(128, padded), 32 * per_column), per_column)
    rows = tile_pools(policy, run.means.device)
    launches.start(
        keep_kernel, (triton.cdiv(run.rows, rows // (policy.block_size // policy.query_pool)), layout.heads, layout.batch),
        run.means, run.keys, run.variances, *run.lists, run.prompts, layout.cu_q, layout.cu_k, layout.q_len, layout.kv_len,
        run.first, run.rows, layout.rows, layout.blocks, width, policy.share, run.shares, run.kept, *run.scales,
        B=policy.block_size, QP=policy.query_pool, KP=policy.key_pool, G=layout.group, SINK=policy.sink_blocks,
        LOCAL=policy.local_blocks, TAIL=policy.tail_blocks, IMPLICIT=run.implicit, BM=rows, BN=columns, D=layout.dim, BD=padded,
        SPREAD=policy.spread > 0, RAGGED=layout.packed, ONE_LENGTH=isinstance(run.prompts, int), num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip


def tile_pools(policy: Mass, device: torch.device) -> int:
    """Return how many query pools a tile of the portable kernel has: whole blocks, also where they have more than measured."""
    return max(tile_launch("mass", architecture(device)).rows, policy.block_size // policy.query_pool)


def select_by_mass(
    call: Call, layout: Layout, dense_below: int, implicit: bool, launches: Launches, keep: Keeper = keep
) -> tuple[Tensor, Tensor]:
    """Choose the blocks that :class:`Mass` keeps; see :data:`stem_attention.backends.triton.backend.Selector`.

    ``keep`` starts the kernel that turns pools into lists.
    """
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
    factor, cap = call.scale * _LOG2E, None if call.softcap is None else call.softcap * _LOG2E
    scales = factor, policy.spread * abs(factor), cap
    step = layout.rows_at_once(per_row * dim * q.element_size(), tile_pools(policy, q.device) // per_row)
    shares = _head_shares(q.device, policy, heads) if policy.head_factors is not None else None
    launches.keep(shares, call.kept)
    means = launches.empty((layout.batch, heads, step, per_row, dim), q.dtype, q.device)
    for first in range(0, layout.rows, step):
        rows = min(step, layout.rows - first)
        key_blocks = layout.blocks * layout.kv_heads if first == 0 else 0  # keys are pooled once, with the first queries
        launches.start(
            pool_kernel, (rows * heads + key_blocks, layout.batch),
            q, means, k, keys, variances, layout.cu_q, layout.cu_k, layout.page_table, *layout.q_strides, *layout.k_strides,
            layout.table_stride, k.shape[0], layout.q_len, layout.kv_len, first, rows, layout.blocks, heads, layout.kv_heads,
            B=size, QP=policy.query_pool, KP=policy.key_pool, D=dim, BD=padded, SPREAD=spread, RAGGED=packed, PAGE=layout.page,
            num_warps=max(1, max(policy.query_pool, policy.key_pool) * padded // 4096),  # so few were by far the fastest
        )  # fmt: skip
        run = Keeping(
            policy, layout, means, keys, variances, (indices, counts), prompts, shares, call.kept, scales, implicit, first, rows
        )  # fmt: skip
        keep(run, launches)
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
