"""Launch of the portable attention kernel."""

from __future__ import annotations

import math

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stem_attention.backends.ragged import Ragged, describable, empty_results
from stem_attention.backends.triton.attention_kernel import attention_kernel
from stem_attention.backends.triton.launch import attention_launch, has_tma


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
) -> tuple[Tensor, Tensor]:
    """Attention over given blocks.

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

    Returns:
        ``out`` like ``q``, and fp32 ``lse``: ``(batch, q_heads, q_len)``, or ``(q_heads, total_q)`` with ``ragged``.
    """
    heads, dim = q.shape[-2:]
    page = k.shape[1] if page_table is not None else 0
    out, lse, lse_strides = empty_results(q, ragged is not None, return_lse)
    q4, o4 = (q, out) if ragged is None else (q[None], out[None])
    k4, v4 = (k, v) if ragged is None or page else (k[None], v[None])
    batch, _, rows, width = indices.shape
    choice = attention_launch(q.device, dim, block_size, True)
    padded_dim = triton.next_power_of_2(dim)
    tma = choice.tma and has_tma(q.device) and all(describable(x) for x in (k4, v4)) and (page == 0 or page % choice.tile == 0)
    if choice.tma and not tma:
        choice = attention_launch(q.device, dim, block_size, False)
    k_tiles, v_tiles = (
        TensorDescriptor(x, list(x.shape), list(x.stride()), [1, choice.tile, 1, padded_dim]) if tma else None for x in (k4, v4)
    )
    if rows:
        attention_kernel[(rows * heads, batch)](
            q4, k4, v4, k_tiles, v_tiles, o4, lse, indices, counts,
            ragged.cu_q if ragged else None, ragged.cu_k if ragged else None, page_table,
            *q4.stride()[:3], *k4.stride()[:3], *v4.stride()[:3], *o4.stride()[:3], *lse_strides,
            page_table.stride(0) if page_table is not None else 0, k4.shape[0],
            0 if ragged else q.shape[1], 0 if ragged else k.shape[1], heads, rows, min(heavy, rows), width,
            scale * math.log2(math.e),
            G=heads // k.shape[-2], B=block_size, BN=choice.tile, D=dim, BD=padded_dim, PAGE=page,
            RAGGED=ragged is not None, TMA=tma, LSE=return_lse, num_warps=choice.warps, num_stages=choice.stages,
        )  # fmt: skip
    return out, lse
