"""Launch of the mass estimate: pool means of queries and keys, and a softmax over the key pools."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from stem_attention.backends.triton.launch import mass_launch
from stem_attention.backends.triton.mass_kernels import mass_kernel, pool_key_means, pool_query_means
from stem_attention.backends.triton.span import Span
from stem_attention.config import StemConfig


class Masses:
    """Estimated masses of one call, a run of query blocks at a time. Arguments and methods as of :class:`Routes`."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, config: StemConfig, scale: float, span: Span, page_table: Tensor | None
    ) -> None:
        self._q, self._config, self._span = q, config, span
        self._scale = scale * math.log2(math.e)
        self._per_row, self._per_column = config.block_size // config.query_pool, config.block_size // config.key_pool
        self._tile = mass_launch(q.device)
        self._keys = _key_means(k, config, span, page_table)
        self.row_bytes = self._per_row * q.shape[-1] * q.element_size()
        self.row_multiple = max(1, self._tile.rows // self._per_row)

    def reserve(self, rows: int) -> None:
        """Make room for runs of up to ``rows`` query blocks."""
        shape = (self._span.batch, self._q.shape[-2], rows, self._per_row, self._q.shape[-1])
        self._means = torch.empty(shape, dtype=self._q.dtype, device=self._q.device)

    def write(self, scores: Tensor, first: int, rows: int) -> None:
        """Write the masses of query blocks ``first`` to ``first + rows``."""
        q, config, span, dim = self._q, self._config, self._span, self._q.shape[-1]
        heads, padded = q.shape[-2], triton.next_power_of_2(dim)
        pool_query_means[(rows, heads, span.batch)](
            q, self._means, span.cu_q, span.cu_k, *span.q_strides, span.q_len, span.kv_len, first, rows,
            B=config.block_size, P=config.query_pool, D=dim, BD=padded, RAGGED=span.cu_q is not None, num_warps=4,
        )  # fmt: skip
        # A tile holds whole blocks, also where a block has more pools than the tile was measured with.
        tile_rows, tile_columns = max(self._tile.rows, self._per_row), max(self._tile.columns, self._per_column)
        mass_kernel[(triton.cdiv(rows, tile_rows // self._per_row), heads, span.batch)](
            self._means, self._keys, scores, span.cu_q, span.cu_k, span.q_len, span.kv_len, first, rows, span.blocks,
            scores.shape[3], self._scale, B=config.block_size, QP=config.query_pool, KP=config.key_pool,
            G=heads // self._keys.shape[1], BM=tile_rows, BN=tile_columns, D=dim, BD=padded, RAGGED=span.cu_q is not None,
            num_warps=self._tile.warps, num_stages=self._tile.stages,
        )  # fmt: skip


def _key_means(k: Tensor, config: StemConfig, span: Span, page_table: Tensor | None) -> Tensor:
    """``(batch, kv_heads, blocks, pools per block, dim)`` in the dtype of ``k``."""
    kv_heads, dim = k.shape[-2:]
    shape = (span.batch, kv_heads, span.blocks, config.block_size // config.key_pool, dim)
    means = torch.empty(shape, dtype=k.dtype, device=k.device)
    packed = span.cu_k is not None and page_table is None
    pool_key_means[(span.blocks, kv_heads, span.batch)](
        k, means, span.cu_k, page_table, *((0, *k.stride()[:2]) if packed else k.stride()[:3]),
        page_table.stride(0) if page_table is not None else 0, k.shape[0], span.kv_len, span.blocks,
        B=config.block_size, P=config.key_pool, D=dim, BD=triton.next_power_of_2(dim), RAGGED=span.cu_k is not None,
        PAGE=k.shape[1] if page_table is not None else 0, num_warps=4,
    )  # fmt: skip
    return means
