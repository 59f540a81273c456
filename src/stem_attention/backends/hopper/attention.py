"""Launch of the Hopper attention kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from stem_attention.backends.hopper.kernel import attention_kernel
from stem_attention.backends.hopper.launch import LAUNCHES, Launch, multiprocessors
from stem_attention.backends.ragged import Ragged

_LAYOUT = gl.NVMMASharedLayout(128, 16, 4)


def can_copy(q: Tensor, k: Tensor, v: Tensor, *, paged: bool) -> bool:
    """Whether the copy engine takes these tensors: 16-byte aligned, and pages of whole boxes of 64 keys."""
    return all(_describable(x) for x in (q, k, v)) and (not paged or k.shape[1] % 64 == 0)


def _describable(x: Tensor) -> bool:
    aligned = all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
    return aligned and x.data_ptr() % 16 == 0 and x.stride(-1) == 1


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

    Args:
        q: ``(batch, q_len, q_heads, dim)``, or ``(total_q, q_heads, dim)`` with ``ragged``.
        k: ``(batch, kv_len, kv_heads, dim)``, ``(total_k, kv_heads, dim)``, or the cache ``(pages, page_size, kv_heads, dim)``.
        v: The shape of ``k``.
        indices: int32 ``(batch, q_heads, rows, width)``. A row whose count is its diagonal block + 1 needs no list.
        counts: int32 ``(batch, q_heads, rows)``.
        block_size: Tokens per block.
        scale: Softmax scale.
        return_lse: Fill ``lse``; it is empty otherwise.
        heavy: Rows at the end that are much longer than the rest, and are therefore started first.
        ragged: Borders of a packed batch.
        page_table: int32 ``(batch, max_pages)``.
        launch: How to run, the library's choice unless given.

    Returns:
        ``out`` like ``q``, and fp32 ``lse``: ``(batch, q_heads, q_len)``, or ``(q_heads, total_q)`` with ``ragged``.
    """
    heads, dim = q.shape[-2:]
    page = k.shape[1] if page_table is not None else 0
    choice = LAUNCHES[block_size, dim] if launch is None else launch
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if ragged is None:
        lse = q.new_empty((q.shape[0], heads, q.shape[1]) if return_lse else (0, 0, 0), dtype=torch.float32)
        lse_strides = lse.stride()[:2]
        q4, o4, k4, v4 = q, out, k, v
    else:
        lse = q.new_empty((heads, q.shape[0]) if return_lse else (0, 0), dtype=torch.float32)
        lse_strides = (0, lse.stride(0))
        q4, o4 = q[None], out[None]
        k4, v4 = (k, v) if page else (k[None], v[None])
    batch, _, rows, width = indices.shape
    if rows == 0 or q.numel() == 0:
        return out, lse
    heavy = min(heavy, rows)
    # Heads of a group read the same keys: as many rows of each as run at once.
    group = heads // k.shape[-2]
    resident = multiprocessors(q.device) * choice.programs
    band = max(1, min(resident // group, rows - heavy))
    tickets = batch * heads * (heavy + -(-(rows - heavy) // band) * band)
    box = choice.tile if page % choice.tile == 0 else 64
    queue = torch.zeros(1, dtype=torch.int32, device=q.device)
    columns = dim if box == choice.tile else 64
    options = {} if choice.programs == 1 else {"maxnreg": choice.entry_registers(block_size)}
    attention_kernel[(min(tickets, resident),)](
        _tiles(q4, 64, dim), _tiles(k4, box, columns), _tiles(v4, box, columns), _tiles(o4, 64, dim), out, lse,
        indices, counts, ragged.cu_q if ragged else None, ragged.cu_k if ragged else None, page_table, queue,
        *o4.stride()[1:3], *lse_strides, page_table.stride(0) if page_table is not None else 0, k4.shape[0],
        0 if ragged else q.shape[1], 0 if ragged else k.shape[1], batch, heads, rows, heavy, band, width, tickets,
        group, scale * math.log2(math.e),
        WGS=block_size // 64, BN=choice.tile, D=dim, STAGES=choice.stages, PAGE=page,
        RAGGED=ragged is not None, LSE=return_lse, BOX=box, QREG=choice.queries_in_registers,
        num_warps=4, **options,
    )  # fmt: skip
    return out, lse


def _tiles(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, 1, columns], _LAYOUT)
