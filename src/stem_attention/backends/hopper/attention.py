"""Launch of the Hopper attention kernel: its choices of tiles, ring depths and programs per multiprocessor, and its start."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from stem_attention.backends.hopper.kernel import attention_kernel
from stem_attention.backends.hopper.launch import compiler_options, tiles
from stem_attention.backends.hopper.pair_kernel import pair_kernel
from stem_attention.backends.triton.attention import in_base_two, lse_strides, positive_scale
from stem_attention.backends.triton.layout import LEAST_BOX, Layout, describable
from stem_attention.backends.triton.program import Launches
from stem_attention.backends.triton.tables import kept_per_stream
from stem_attention.call import Call


@dataclass(frozen=True)
class Launch:
    """How the kernel runs."""

    tile: int  # keys per step: a block or half of one
    slots: int  # of a ring of keys or values, of ``tile`` each
    programs: int = 1  # that share a multiprocessor
    queries_in_registers: bool = False  # moved there from shared memory once per task
    rows: int = 1  # that a task has; of two, what both keep is fetched once, and each has rings of its own for the rest

    def warpgroups(self, block_size: int) -> int:
        """Count those that compute: one for every 64 queries."""
        return self.rows * block_size // 64


IN_L2 = 32 << 20  # bytes of keys and values that the cache of 50 MB holds beside what passes through it

# By block size and dimension of keys, measured on an H200; keys of 192 and tasks of two rows on an H100.
LAUNCHES = {
    (128, 64): Launch(tile=128, slots=4),
    (128, 128): Launch(tile=128, slots=2),
    (128, 192): Launch(tile=128, slots=2),
    (128, 256): Launch(tile=64, slots=2),
    (64, 64): Launch(tile=64, slots=4, programs=3, queries_in_registers=True),
    (64, 128): Launch(tile=64, slots=2, queries_in_registers=True, rows=2),
    (64, 192): Launch(tile=64, slots=2, programs=2, queries_in_registers=True),
    (64, 256): Launch(tile=64, slots=3),
}


def can_copy(call: Call) -> bool:
    """Tell whether the copy engine takes a call's tensors: 16-byte aligned, and pages of whole boxes of 32 keys."""
    tensors = (call.q, call.k, call.v) if call.out is None else (call.q, call.k, call.v, call.out)
    return all(describable(x) for x in tensors) and (not call.paged or call.k.shape[1] % LEAST_BOX == 0)


def attend(
    call: Call, layout: Layout, indices: Tensor, counts: Tensor, block_size: int, heavy: int, launches: Launches
) -> tuple[Tensor, Tensor]:
    """Compute attention over given blocks, for calls that :func:`can_copy` accepts.

    Arguments and results are those of :func:`stem_attention.backends.triton.attention.attend`.
    """
    q, scale = positive_scale(call.q, call.scale)
    out, lse = call.empty_results()
    if layout.rows == 0:
        return out, lse
    q4, k4, v4, o4 = (x[None] if x.dim() == 3 else x for x in (q, call.k, call.v, out))
    batch, heads, dim, rows, page = layout.batch, layout.heads, layout.value_dim, layout.rows, layout.page
    choice, rest = LAUNCHES[block_size, layout.dim], layout.dim - dim
    # Nobody says of lists from elsewhere which rows are long. The last ones of a head see the most keys.
    tasks, heavy = (-(-n // choice.rows) for n in (rows, min(max(heavy, 1), rows)))
    tickets = batch * heads * tasks
    resident = multiprocessors(q.device) * choice.programs
    # The copy engine fetches a tile in boxes that lie in one page and in one block.
    box = next(box for box in (128, 64, LEAST_BOX) if page % box == 0 and box <= choice.tile)
    queue = _queue(q.device)
    launches.keep(queue)
    columns = dim if box == choice.tile else 64
    kernel, shape = attention_kernel, {
        "WGS": block_size // 64, "BN": choice.tile, "QREG": choice.queries_in_registers, "REST": rest,
    }  # fmt: skip
    if choice.rows == 2:
        kernel, shape = pair_kernel, {}
    launches.start(
        kernel, (min(tickets, resident),),
        tiles(q4, 64, rest or dim), tiles(k4, box, rest or columns), tiles(v4, box, columns), tiles(o4, 64, dim), out, lse,
        call.sinks, indices, counts, layout.cu_q, layout.cu_k, layout.page_table, queue, *o4.stride()[1:3],
        *lse_strides(call, lse), layout.table_stride, k4.shape[0], layout.q_len, layout.kv_len, batch, heads, rows, heavy,
        max(1, tasks - heavy), _abreast(layout, block_size), indices.shape[3], tickets, layout.group,
        *in_base_two(scale, call.softcap),
        D=dim, SLOTS=choice.slots, PAGE=page, RAGGED=layout.packed, LSE=call.return_lse, BOX=box, **shape,
        **compiler_options(choice.warpgroups(block_size), choice.programs),
    )  # fmt: skip
    return out, lse


def _abreast(layout: Layout, block_size: int) -> int:
    """Count the heads, whole groups and a divisor of all, whose keys and values lie in the L2 cache together."""
    of_head = layout.blocks * block_size * (layout.dim + layout.value_dim) * 2
    groups = layout.batch * layout.kv_heads
    most = min(max(1, IN_L2 // of_head), groups)
    return layout.group * next(n for n in range(most, 0, -1) if groups % n == 0)


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU. Meta tensors are launched nowhere: any number will do."""
    return 1 if device.type == "meta" else int(torch.cuda.get_device_properties(device).multi_processor_count)


@kept_per_stream
def _queue(device: torch.device) -> Tensor:
    """int32 ``(1,)``: 0 when a kernel begins, and again when it has ended."""
    return torch.zeros(1, dtype=torch.int32, device=device)
