"""Launch of the Hopper kernel for the gradients of keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from stem_attention.backends.hopper.backward_kernel import dkv_kernel
from stem_attention.backends.hopper.launch import compiler_options, tiles
from stem_attention.backends.triton.backward import Chunks, Inputs, Scales
from stem_attention.backends.triton.backward import start_chunks as start_portable_chunks
from stem_attention.backends.triton.kept import Columns
from stem_attention.backends.triton.layout import Layout, describable
from stem_attention.backends.triton.program import Launches


@dataclass(frozen=True)
class Launch:
    """How the kernel runs."""

    slots: int  # of the ring, of 64 queries each
    programs: int = 1  # that share a multiprocessor

    def options(self, block_size: int) -> dict[str, int]:
        """Return the compiler's: a warpgroup computes 64 keys."""
        return compiler_options(block_size // 64, self.programs)


# By block size and head dimension, measured on an H100: deeper rings were no faster.
LAUNCHES = {
    (128, 64): Launch(slots=2),
    (128, 128): Launch(slots=2),
    (64, 64): Launch(slots=2, programs=2),
    (64, 128): Launch(slots=2, programs=2),
}


def start_chunks(
    layout: Layout, size: int, inputs: Inputs, results: Chunks, columns: Columns, scales: Scales, launches: Launches
) -> None:  # fmt: skip
    """Launch the kernel for all chunks of all key blocks.

    Packed batches, soft caps, values of another dimension and tensors that the copy engine does not take run the portable one.
    """
    q, k, v, d_out, lse, delta = inputs
    dim, tensors = q.shape[3], (q, k, v, d_out)
    choice = LAUNCHES.get((size, dim))
    scale, factor, steepness = scales
    other = layout.packed or steepness is not None or v.shape[3] != dim
    if choice is None or other or not all(map(describable, tensors)):
        return start_portable_chunks(layout, size, inputs, results, columns, scales, launches)
    described = (tiles(x, 64, dim) for x in tensors)
    launches.start(
        dkv_kernel, (len(columns.owners),), *described, lse, delta, *results, columns.lists, columns.starts, columns.owners,
        columns.firsts, columns.slots, columns.longest, *results[0].stride()[:3], *results[1].stride()[:3],
        *lse.stride()[:2], *delta.stride()[:2], layout.q_len, layout.kv_len, layout.kv_heads, layout.rows, layout.blocks,
        len(columns.chunks), scale, factor,
        G=layout.group, WGS=size // 64, D=dim, SLOTS=choice.slots, **choice.options(size),
    )  # fmt: skip
