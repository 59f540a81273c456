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
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr, SCALED: tl.constexpr, BY_HEAD: tl.constexpr,
):  # fmt: skip
    """Write ``BN`` tokens of one head of one sequence. See :func:`packed` for the shapes."""
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
    wide_head = head.to(tl.int64)
    keys = tl.load(k + (page * k_stride_p + slot * k_stride_s + wide_head * k_stride_h)[:, None] + dims, mask=mask)
    values = tl.load(v + (page * v_stride_p + slot * v_stride_s + wide_head * v_stride_h)[:, None] + dims, mask=mask)
    if SCALED:
        of_head = head if BY_HEAD else 0
        keys = keys.to(tl.float32) * tl.load(k_scale + of_head)
        values = values.to(tl.float32) * tl.load(v_scale + of_head)
    tl.store(k_out + to, keys, mask=mask)
    tl.store(v_out + to, values, mask=mask)


def packed(call: Call, launches: Launches) -> tuple[Tensor, Tensor]:
    """Return keys and values of a paged call, each ``(total_k, kv_heads, dim)`` in the dtype of its queries.

    They are multiplied by ``k_scale`` and ``v_scale`` where the call has these.
    """
    k, v, batch, scale = call.k, call.v, call.batch, call.k_scale
    assert batch is not None
    assert batch.page_table is not None
    _, page, heads, dim = k.shape
    out = torch.empty(2, batch.k_starts[-1], heads, dim, dtype=call.q.dtype, device=k.device)
    grid = (triton.cdiv(batch.max_k, _TOKENS), heads, batch.sequences)
    launches.start(
        pack_kernel, grid,
        k, v, scale, call.v_scale, out[0], out[1], batch.cu_k, batch.page_table, *k.stride()[:3], *v.stride()[:3],
        batch.page_table.stride(0), k.shape[0], heads,
        D=dim, BD=triton.next_power_of_2(dim), BN=_TOKENS, PAGE=page, SCALED=scale is not None,
        BY_HEAD=scale is not None and scale.numel() > 1,
    )  # fmt: skip
    return out[0], out[1]
