"""Launch of the Hopper kernel that keeps by mass, behind the portable pooling."""

from dataclasses import dataclass, replace

import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from stem_attention.backends.hopper.mass_kernel import keep_kernel
from stem_attention.backends.triton import mass as portable
from stem_attention.backends.triton.layout import Layout
from stem_attention.backends.triton.mass import Keeping
from stem_attention.backends.triton.program import Launches
from stem_attention.call import Call
from stem_attention.policies.base import Policy
from stem_attention.policies.mass import Mass

_TILE = 64  # query pools of a warpgroup, and key pools of a step
_LAYOUT = gl.NVMMASharedLayout(128, 16, 3)


@dataclass(frozen=True)
class Launch:
    """How the kernel runs."""

    slots: int  # of the ring, of ``_TILE`` key pools each, means and variances
    registers: int  # of a thread that computes
    entry_registers: int  # of all threads at entry, so that as many programs fit a multiprocessor as its shared memory takes


_ONE, _TWO = Launch(slots=2, registers=240, entry_registers=168), Launch(slots=1, registers=104, entry_registers=80)


def choose(dim: int, keys: int) -> Launch:
    """Choose how many programs share a multiprocessor, by what was faster on an H100 for so many keys of a sequence."""
    if dim == 256:
        return replace(_ONE, slots=1)  # all that there is shared memory for
    return _TWO if dim == 128 and keys > 16384 else _ONE


def select_by_mass(call: Call, layout: Layout, dense_below: int, implicit: bool, launches: Launches) -> tuple[Tensor, Tensor]:
    """Choose the blocks that :class:`Mass` keeps; see :data:`stem_attention.backends.triton.backend.Selector`."""
    keeper = keep if takes(call.policy) else portable.keep
    return portable.select_by_mass(call, layout, dense_below, implicit, launches, keeper)


def takes(policy: Policy) -> bool:
    """Tell whether a block has 2 to 64 pools: with one a word has no bit for each block of a step, with more a tile no row."""
    assert isinstance(policy, Mass)
    return all(2 <= policy.block_size // pool <= _TILE for pool in (policy.query_pool, policy.key_pool))


def keep(run: Keeping, launches: Launches) -> None:
    """Start the kernel."""
    policy, layout = run.policy, run.layout
    launch = choose(layout.dim, layout.blocks * policy.block_size)
    launches.start(
        keep_kernel, (layout.heads, triton.cdiv(run.rows, 2 * _TILE * policy.query_pool // policy.block_size), layout.batch),
        _tiles(run.means, run.rows), _tiles(run.keys, layout.blocks), _tiles(run.variances, layout.blocks), *run.lists,
        run.prompts, layout.cu_q, layout.cu_k, layout.q_len, layout.kv_len, run.first, run.rows, layout.rows,
        run.lists[0].shape[3], policy.share, run.shares, run.kept, *run.scales, B=policy.block_size, QP=policy.query_pool,
        KP=policy.key_pool, G=layout.group, SINK=policy.sink_blocks, LOCAL=policy.local_blocks, TAIL=policy.tail_blocks,
        IMPLICIT=run.implicit, BN=_TILE, D=layout.dim, SLOTS=launch.slots, SPREAD=policy.spread > 0, RAGGED=layout.packed,
        ONE_LENGTH=isinstance(run.prompts, int), REGISTERS=launch.registers, num_warps=4, maxnreg=launch.entry_registers,
    )  # fmt: skip


def _tiles(pools: Tensor, rows: int) -> TensorDescriptor:
    """Tiles of one head's pools, of which ``rows`` rows or blocks are there."""
    batch, heads, _, count, dim = pools.shape
    return TensorDescriptor(pools, [batch * heads, rows * count, dim], [rows * count * dim, dim, 1], [1, _TILE, dim], _LAYOUT)
