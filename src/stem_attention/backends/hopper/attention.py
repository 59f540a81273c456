"""Launch of the Hopper attention kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from stem_attention.backends.hopper.kernel import attention_kernel
from stem_attention.backends.hopper.launch import LAUNCHES, Launch, multiprocessors
from stem_attention.backends.ragged import Ragged, describable, empty_results

_LAYOUT = gl.NVMMASharedLayout(128, 16, 4)


def can_copy(q: Tensor, k: Tensor, v: Tensor, *, paged: bool) -> bool:
    """Whether the copy engine takes these tensors: 16-byte aligned, and pages of whole boxes of 64 keys."""
    return all(describable(x) for x in (q, k, v)) and (not paged or k.shape[1] % 64 == 0)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    block_size: int,
    scale: float,
    *,
    return_lse: bool = True,
    heavy: int = 0,
    ragged: Ragged | None = None,
    page_table: Tensor | None = None,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over given blocks, for tensors that :func:`can_copy` accepts.

    Arguments and results are those of :func:`stem_attention.backends.triton.attention.attend`; ``launch`` says how to run, the
    library's choice unless given.
    """
    heads, dim = q.shape[-2:]
    page = k.shape[1] if page_table is not None else 0
    choice = LAUNCHES[block_size, dim] if launch is None else launch
    out, lse, lse_strides = empty_results(q, ragged is not None, return_lse)
    q4, o4 = (q, out) if ragged is None else (q[None], out[None])
    k4, v4 = (k, v) if ragged is None or page else (k[None], v[None])
    batch, _, rows, width = indices.shape
    if rows == 0 or q.numel() == 0:
        return out, lse
    heavy = min(heavy, rows)
    # Heads of a group read the same keys: as many rows of each as run at once.
    group = heads // k.shape[-2]
    resident = multiprocessors(q.device) * choice.programs
    band = max(1, min(resident // group, rows - heavy))
    tickets = batch * heads * (heavy + -(-(rows - heavy) // band) * band)
    # Boxes of 64 keys fit into every page, and two blocks of 64 lie apart.
    box = choice.tile if page % choice.tile == 0 and choice.tile <= block_size else 64
    queue = torch.zeros(1, dtype=torch.int32, device=q.device)
    columns = dim if box == choice.tile else 64
    options = {} if choice.programs == 1 else {"maxnreg": choice.entry_registers(block_size)}
    attention_kernel[(min(tickets, resident),)](
        _tiles(q4, 64, dim), _tiles(k4, box, columns), _tiles(v4, box, columns), _tiles(o4, 64, dim), out, lse,
        indices, counts, ragged.cu_q if ragged else None, ragged.cu_k if ragged else None, page_table, queue,
        *o4.stride()[1:3], *lse_strides, page_table.stride(0) if page_table is not None else 0, k4.shape[0],
        0 if ragged else q.shape[1], 0 if ragged else k.shape[1], batch, heads, rows, heavy, band, width, tickets,
        group, scale * math.log2(math.e),
        WGS=block_size // 64, BN=choice.tile, D=dim, KS=choice.key_slots, VS=choice.value_slots, PAGE=page,
        RAGGED=ragged is not None, LSE=return_lse, BOX=box, QREG=choice.queries_in_registers,
        num_warps=4, **options,
    )  # fmt: skip
    return out, lse


def _tiles(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, 1, columns], _LAYOUT)
