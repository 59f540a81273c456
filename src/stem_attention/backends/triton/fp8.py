"""Keys and values of a paged fp8 cache in the precision of the queries, one sequence after the other.

The kernels that choose and attend then read what they read elsewhere, at the speed that they have there: a pass over the cache
is a few hundredths of the attention over it. Tile: ``BN`` tokens of one kv head.
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
def dequantise_kernel(
    k, v, k_scale, v_scale, k_out, v_out, cu_k, page_table,
    k_stride_p, k_stride_s, k_stride_h, v_stride_p, v_stride_s, v_stride_h, table_stride, pages, heads,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    """Write ``BN`` tokens of one head of one sequence. See :func:`dequantised` for the shapes."""
    head, z = tl.program_id(1), tl.program_id(2)
    first, kv_len = key_span(z, cu_k, 0, True)
    positions = tl.program_id(0) * BN + tl.arange(0, BN)
    if tl.program_id(0) * BN >= kv_len:
        return
    dims = tl.arange(0, BD)
    valid = positions < kv_len
    mask = valid[:, None] & (dims < D)[None, :]
    page, slot = key_rows(z, first, positions, valid, page_table, table_stride, pages, PAGE, True)
    to = ((first + positions).to(tl.int64) * heads + head)[:, None] * D + dims
    of_head = head if PER_HEAD else 0
    keys = tl.load(k + (page * k_stride_p + slot * k_stride_s + head.to(tl.int64) * k_stride_h)[:, None] + dims, mask=mask)
    tl.store(k_out + to, keys.to(tl.float32) * tl.load(k_scale + of_head), mask=mask)
    values = tl.load(v + (page * v_stride_p + slot * v_stride_s + head.to(tl.int64) * v_stride_h)[:, None] + dims, mask=mask)
    tl.store(v_out + to, values.to(tl.float32) * tl.load(v_scale + of_head), mask=mask)


def dequantised(call: Call, launches: Launches) -> tuple[Tensor, Tensor]:
    """Return keys and values of a call with ``k_scale`` and ``v_scale``, each ``(total_k, kv_heads, dim)`` like its queries."""
    k, v, batch = call.k, call.v, call.batch
    assert batch is not None
    assert batch.page_table is not None
    assert call.k_scale is not None
    assert call.v_scale is not None
    _, page, heads, dim = k.shape
    out = torch.empty(2, batch.k_starts[-1], heads, dim, dtype=call.q.dtype, device=k.device)
    grid = (triton.cdiv(batch.max_k, _TOKENS), heads, batch.sequences)
    launches.start(
        dequantise_kernel, grid,
        k, v, call.k_scale, call.v_scale, out[0], out[1], batch.cu_k, batch.page_table, *k.stride()[:3], *v.stride()[:3],
        batch.page_table.stride(0), k.shape[0], heads,
        D=dim, BD=triton.next_power_of_2(dim), BN=_TOKENS, PAGE=page, PER_HEAD=call.k_scale.numel() > 1,
    )  # fmt: skip
    return out[0], out[1]
