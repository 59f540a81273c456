"""Launch of the portable attention kernel."""

import math
from dataclasses import replace

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stem_attention.backends.triton.attention_kernel import attention_kernel
from stem_attention.backends.triton.launch import architecture, attention_launch, has_tma
from stem_attention.backends.triton.layout import Layout, describable
from stem_attention.backends.triton.program import Launches
from stem_attention.call import Call

_LOG2E = math.log2(math.e)
_LEAST_SCALE = torch.finfo(torch.float32).smallest_normal


def attend(
    call: Call, layout: Layout, indices: Tensor, counts: Tensor, block_size: int, heavy: int, launches: Launches
) -> tuple[Tensor, Tensor]:
    """Compute attention over given blocks, whatever the call's policy; results as :meth:`Call.empty_results` makes room for.

    Args:
        call: The call.
        layout: Where its tensors lie.
        indices: int32 ``(batch, q_heads, rows, width)``. A row whose count is its diagonal block + 1 needs no list.
        counts: int32 ``(batch, q_heads, rows)``.
        block_size: Tokens per block.
        heavy: Rows at the end that are much longer than the rest, and are therefore started first.
        launches: Starts the kernel.
    """
    q, scale = positive_scale(call.q, call.scale)
    out, lse = call.empty_results()
    if layout.rows == 0:
        return out, lse
    q4, k4, v4, o4 = (x[None] if x.dim() == 3 else x for x in (q, call.k, call.v, out))
    heads, dim, value_dim, rows, page = layout.heads, layout.dim, layout.value_dim, layout.rows, layout.page
    card, larger = architecture(q.device), max(layout.dim, layout.value_dim)
    choice = attention_launch(card, larger, block_size)
    padded, padded_value = triton.next_power_of_2(dim), triton.next_power_of_2(value_dim)
    tma = choice.tma and has_tma(card) and all(describable(x) for x in (k4, v4)) and (page == 0 or page % choice.tile == 0)
    if choice.tma and not tma:
        choice = attention_launch(card, larger, block_size, descriptors=False)
    if card == "sm90" and padded > 128 and padded_value < 64:
        # Triton 3.6 miscompiles such products of four warps where it does not pipeline their loop (docs/kernels-record.md).
        choice = replace(choice, warps=8)
    k_tiles, v_tiles = (
        TensorDescriptor(x, list(x.shape), list(x.stride()), [1, choice.tile, 1, width]) if tma else None
        for x, width in ((k4, padded), (v4, padded_value))
    )
    launches.start(
        attention_kernel, (rows * heads, layout.batch),
        q4, k4, v4, k_tiles, v_tiles, o4, lse, call.sinks, indices, counts, layout.cu_q, layout.cu_k, layout.page_table,
        *q4.stride()[:3], *k4.stride()[:3], *v4.stride()[:3], *o4.stride()[:3], *lse_strides(call, lse), layout.table_stride,
        k4.shape[0], layout.q_len, layout.kv_len, heads, rows, min(heavy, rows), indices.shape[3],
        *in_base_two(scale, call.softcap), call.window,
        G=layout.group, B=block_size, BN=choice.tile, D=dim, BD=padded, DV=value_dim, BDV=padded_value, PAGE=page,
        RAGGED=layout.packed, TMA=tma, LSE=call.return_lse, num_warps=choice.warps, num_stages=choice.stages,
    )  # fmt: skip
    return out, lse


def positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """Return queries and a scale above 0 of the same scores: kernels scale a row's largest, and its future's minus infinity."""
    if scale >= _LEAST_SCALE:
        return q, scale
    return (q * -1.0, -scale) if scale <= -_LEAST_SCALE else (q * 0.0, 1.0)


def in_base_two(scale: float, softcap: float | None) -> tuple[float, float | None]:
    """Return what kernels multiply the products of queries and keys by, and under a soft cap what they do so before tanh."""
    return (scale * _LOG2E, None) if softcap is None else (softcap * _LOG2E, scale / softcap)


def lse_strides(call: Call, lse: Tensor) -> tuple[int, int]:
    """Return the strides of ``lse`` by sequence and head."""
    if not call.return_lse:
        return 0, 0
    return (0, lse.stride(0)) if call.batch is not None else (lse.stride(0), lse.stride(1))
