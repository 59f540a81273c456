"""Describe where one sequence of a batch lies, shared by every kernel.

A batch is either rectangular, ``(batch, length, heads, dim)`` with one length for all, or ragged, packed along one
dimension with cumulative lengths. Keys may further lie in a paged cache. Offsets are int64: a cache or a long batch holds
more than 2**31 elements.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def query_span(z, cu_q, q_len, RAGGED: tl.constexpr):
    """``(first token, tokens)`` of sequence ``z`` in its queries' storage."""
    if RAGGED:
        first = tl.load(cu_q + z)
        return first, tl.load(cu_q + z + 1) - first
    else:
        return 0, q_len


@triton.jit
def key_span(z, cu_k, kv_len, RAGGED: tl.constexpr):
    """``(first token, tokens)`` of sequence ``z`` in its keys' storage."""
    if RAGGED:
        first = tl.load(cu_k + z)
        return first, tl.load(cu_k + z + 1) - first
    else:
        return 0, kv_len


@triton.jit
def key_rows(z, first, positions, valid, page_table, table_stride, pages, PAGE: tl.constexpr, RAGGED: tl.constexpr):
    """``(outer, inner)`` storage indices of key positions: (page, slot), or (batch, token)."""
    if PAGE:
        page = tl.load(page_table + z.to(tl.int64) * table_stride + positions // PAGE, mask=valid, other=0)
        page = tl.minimum(tl.maximum(page, 0), pages - 1)  # a table on the device is not validated
        return page.to(tl.int64), (positions % PAGE).to(tl.int64)
    elif RAGGED:
        return tl.zeros_like(positions).to(tl.int64), (first + positions).to(tl.int64)
    else:
        return tl.zeros_like(positions).to(tl.int64) + z, positions.to(tl.int64)
