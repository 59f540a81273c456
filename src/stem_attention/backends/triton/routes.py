"""Launch of the published score: group sums of queries and keys, the values' magnitude, one product."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from stem_attention.backends.triton.launch import score_launch
from stem_attention.backends.triton.pool_kernels import pool_keys, pool_queries
from stem_attention.backends.triton.score_kernel import score_kernel
from stem_attention.backends.triton.span import Span
from stem_attention.config import StemConfig
from stem_attention.policies.budget import block_count
from stem_attention.policies.metric import zscore_magnitude


class Routes:
    """Output-Aware Metric scores of one call, a run of query blocks at a time.

    Args:
        q: As in :func:`stem_attention.backends.triton.select.select`, likewise the rest.
        k: Keys.
        v: Values.
        config: What to keep.
        scale: Softmax scale.
        span: What part of the batch to look at.
        page_table: int32 ``(batch, max_pages)``.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, config: StemConfig, scale: float, span: Span, page_table: Tensor | None
    ) -> None:
        self._q, self._scale, self._config, self._span = q, scale, config, span
        self._kv_heads = k.shape[-2]
        self._split = q.dtype in (torch.bfloat16, torch.float16) and q.device.type != "cpu"
        self._keys = _pool_keys(k, v, config, span, self._split, page_table)
        self._tile = score_launch(q.device)
        self._width = config.stride * q.shape[-1]
        self.row_bytes = self._width * 4
        """Workspace of a query block of one head, besides its scores."""
        self.row_multiple = self._tile.rows
        """Runs of so many query blocks fill whole tiles."""

    def reserve(self, rows: int) -> None:
        """Make room for runs of up to ``rows`` query blocks."""
        shape = (self._span.batch, self._q.shape[-2], rows, self._width)
        dtype = torch.bfloat16 if self._split else torch.float32
        self._high = torch.empty(shape, dtype=dtype, device=self._q.device)
        self._low = torch.empty_like(self._high) if self._split else self._high

    def write(self, scores: Tensor, first: int, rows: int) -> None:
        """Score query blocks ``first`` to ``first + rows`` into ``scores (batch, heads, at least rows, columns)``."""
        q, config, span, tile, dim = self._q, self._config, self._span, self._tile, self._q.shape[-1]
        heads, common = q.shape[-2], {"B": config.block_size, "RAGGED": span.cu_q is not None}
        pool_queries[(rows, heads, span.batch)](
            q, self._high, self._low, span.cu_q, span.cu_k, *span.q_strides, span.q_len, span.kv_len, first, rows,
            S=config.stride, D=dim, BD=triton.next_power_of_2(dim), SPLIT=self._split, num_warps=2 if dim <= 128 else 4,
            **common,
        )  # fmt: skip
        tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(span.blocks, tile.columns)
        score_kernel[(tiles, heads, span.batch)](
            self._high, self._low, *self._keys, scores, span.cu_q, span.cu_k, span.q_len, span.kv_len, first, rows,
            span.blocks, scores.shape[3], self._scale, WIDTH=self._width, R=config.block_size // config.stride,
            G=heads // self._kv_heads, BM=tile.rows, BN=tile.columns, BK=tile.inner, SPLIT=self._split,
            num_warps=tile.warps, num_stages=tile.stages, **common,
        )  # fmt: skip


def _pool_keys(
    k: Tensor, v: Tensor, config: StemConfig, span: Span, split: bool, page_table: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """High and low parts of the pooled keys ``(batch, kv_heads, blocks, stride * dim)``, and ``beta * magnitude``."""
    size, stride, (kv_heads, dim) = config.block_size, config.stride, k.shape[-2:]
    shape = (span.batch, kv_heads, span.blocks)
    high = k.new_empty((*shape, stride * dim), dtype=torch.bfloat16 if split else torch.float32)
    low = torch.empty_like(high) if split else high
    parts = size // stride if config.magnitude == "zscore" else 1
    value = k.new_empty((*shape, parts), dtype=torch.float32)
    packed = span.cu_k is not None and page_table is None
    k_strides, v_strides = ((0, *x.stride()[:2]) if packed else x.stride()[:3] for x in (k, v))
    pool_keys[(span.blocks, kv_heads, span.batch)](
        k, v, high, low, value, span.cu_k, page_table, *k_strides, *v_strides,
        page_table.stride(0) if page_table is not None else 0, k.shape[0], span.kv_len, span.blocks,
        config.beta if config.magnitude == "log" else 0.0, NORMS=parts,
        B=size, S=stride, D=dim, BD=triton.next_power_of_2(dim), SPLIT=split, RAGGED=span.cu_k is not None,
        PAGE=k.shape[1] if page_table is not None else 0, num_warps=2 if dim <= 128 else 4,
    )  # fmt: skip
    if config.magnitude == "zscore":
        peaks = value.flatten(2)[..., : block_count(span.kv_len, stride)]
        value = config.beta * zscore_magnitude(peaks, span.kv_len // stride, parts)
    return high, low, value
