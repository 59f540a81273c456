"""Keys and values of a paged cache, packed and in the precision of the queries.

Kernels that choose and attend then read fp8 caches, and pages of single tokens, at the speed that they have elsewhere. A pass
over the cache takes a few hundredths of the attention over it. Tile: ``BN`` tokens of one kv head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stem_attention.backends.triton.geometry import key_rows, key_span
from stem_attention.backends.triton.program import Launches
from stem_attention.call import Call

_TOKENS = 64


@triton.jit(do_not_specialize=["table_stride", "pages"])
def pack_kernel(
    k, v, k_scale, v_scale, k_out, v_out, cu_k, page_table,
    k_stride_p, k_stride_s, k_stride_h, v_stride_p, v_stride_s, v_stride_h, table_stride, pages, heads,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr,
    SCALED: tl.constexpr, BY_HEAD: tl.constexpr,
):  # fmt: skip
    """Write ``BN`` tokens of one head of one sequence. See :func:`packed` for the shapes."""
    head, z = tl.program_id(1), tl.program_id(2)
    first, kv_len = key_span(z, cu_k, 0, True)
    positions = tl.program_id(0) * BN + tl.arange(0, BN)
    if tl.program_id(0) * BN >= kv_len:
        return
    valid = positions < kv_len
    dims, value_dims = tl.arange(0, BD), tl.arange(0, BDV)
    mask, value_mask = valid[:, None] & (dims < D)[None, :], valid[:, None] & (value_dims < DV)[None, :]
    page, slot = key_rows(z, first, positions, valid, page_table, table_stride, pages, PAGE, True)
    to = ((first + positions).to(tl.int64) * heads + head)[:, None]
    wide_head = head.to(tl.int64)
    keys = tl.load(k + (page * k_stride_p + slot * k_stride_s + wide_head * k_stride_h)[:, None] + dims, mask=mask)
    value_rows = v + (page * v_stride_p + slot * v_stride_s + wide_head * v_stride_h)[:, None]
    values = tl.load(value_rows + value_dims, mask=value_mask)
    if SCALED:
        of_head = head if BY_HEAD else 0
        keys = keys.to(tl.float32) * tl.load(k_scale + of_head)
        values = values.to(tl.float32) * tl.load(v_scale + of_head)
    tl.store(k_out + to * D + dims, keys, mask=mask)
    tl.store(v_out + to * DV + value_dims, values, mask=value_mask)


def packed(call: Call, launches: Launches) -> tuple[Tensor, Tensor]:
    """Return keys and values of a paged call, ``(total_k, kv_heads, dim)`` each, in the dtype of its queries.

    They are multiplied by ``k_scale`` and ``v_scale`` where the call has these.
    """
    k, v, batch, scale = call.k, call.v, call.batch, call.k_scale
    assert batch is not None
    assert batch.page_table is not None
    _, page, heads, dim = k.shape
    value_dim = v.shape[-1]
    keys, values = (torch.empty(batch.k_starts[-1], heads, d, dtype=call.q.dtype, device=k.device) for d in (dim, value_dim))
    grid = (triton.cdiv(batch.max_k, _TOKENS), heads, batch.sequences)
    launches.start(
        pack_kernel, grid,
        k, v, scale, call.v_scale, keys, values, batch.cu_k, batch.page_table, *k.stride()[:3], *v.stride()[:3],
        batch.page_table.stride(0), k.shape[0], heads,
        D=dim, BD=triton.next_power_of_2(dim), DV=value_dim, BDV=triton.next_power_of_2(value_dim), BN=_TOKENS, PAGE=page,
        SCALED=scale is not None, BY_HEAD=scale is not None and scale.numel() > 1,
    )  # fmt: skip
    return keys, values
