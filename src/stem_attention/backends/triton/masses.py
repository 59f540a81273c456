"""Launch of the selection by mass: statistics of pools of keys and queries, and one kernel from there to the lists."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from stem_attention.backends.triton.launch import mass_launch
from stem_attention.backends.triton.mass_kernels import keep_kernel, pool_key_means, pool_query_means
from stem_attention.backends.triton.span import Span
from stem_attention.backends.triton.tables import device_table, kept_per_stream
from stem_attention.config import StemConfig

# Pooled queries of one run of query blocks.
_WORKSPACE_BYTES = 128 << 20


def keep_by_mass(
    q: Tensor, k: Tensor, config: StemConfig, scale: float, span: Span, page_table: Tensor | None, prompts: Tensor,
    indices: Tensor, counts: Tensor, *, implicit: bool,
) -> None:  # fmt: skip
    """Write the lists of a call; arguments as of :func:`stem_attention.backends.triton.select.select`.

    Args:
        q: Queries.
        k: Keys.
        config: What to keep.
        scale: Softmax scale.
        span: What part of the batch to look at.
        page_table: int32 ``(batch, max_pages)``.
        prompts: int32 ``(1 or batch, 1)``, blocks of each whole prompt, 0 for one that keeps everything.
        indices: int32 ``(batch, heads, rows, width)``, written.
        counts: int32 ``(batch, heads, rows)``, written.
        implicit: Rows that keep everything get no list.
    """
    size, (heads, dim), padded = config.block_size, q.shape[-2:], triton.next_power_of_2(q.shape[-1])
    per_row, per_column, ragged = size // config.query_pool, size // config.key_pool, span.cu_q is not None
    tile = mass_launch(q.device)
    # A tile holds whole blocks, also where a block has more pools than the tile was measured with; and no more keys or blocks
    # than its registers and shared memory do.
    tile_rows = max(tile.rows, per_row)
    tile_columns = max(min(tile.columns * 128 // max(128, padded), 32 * per_column), per_column)
    keys, variances = _pool_keys(k, config, span, page_table)
    factor = scale * math.log2(math.e)
    step = max(1, min(span.rows, _WORKSPACE_BYTES // (span.batch * heads * per_row * dim * q.element_size())))
    step = step // (tile_rows // per_row) * (tile_rows // per_row) or step  # whole tiles, when there is room for one
    head_shares = _head_shares(q.device, config, heads) if config.head_factors is not None else None
    means = torch.empty((span.batch, heads, step, per_row, dim), dtype=q.dtype, device=q.device)
    for first in range(0, span.rows, step):
        rows = min(step, span.rows - first)
        pool_query_means[(rows, heads, span.batch)](
            q, means, span.cu_q, span.cu_k, *span.q_strides, span.q_len, span.kv_len, first, rows,
            B=size, P=config.query_pool, D=dim, BD=padded, RAGGED=ragged, num_warps=_pool_warps(config.query_pool, padded),
        )  # fmt: skip
        keep_kernel[(triton.cdiv(rows, tile_rows // per_row), heads, span.batch)](
            means, keys, variances, indices, counts, prompts, span.cu_q, span.cu_k, span.q_len, span.kv_len, first, rows,
            span.rows, span.blocks, indices.shape[3], config.share, head_shares, factor, config.spread * abs(factor), B=size,
            QP=config.query_pool, KP=config.key_pool, G=heads // k.shape[-2], SINK=config.sink_blocks,
            LOCAL=config.local_blocks, TAIL=config.tail_blocks, IMPLICIT=implicit, BM=tile_rows, BN=tile_columns, D=dim,
            BD=padded, SPREAD=config.spread > 0, RAGGED=ragged, ONE_LENGTH=len(prompts) == 1, num_warps=tile.warps,
            num_stages=tile.stages,
        )  # fmt: skip


@kept_per_stream
def _head_shares(device: torch.device, config: StemConfig, heads: int) -> Tensor:
    """fp32 ``(1, heads)``."""
    return device_table([[config.head_share(head) for head in range(heads)]], torch.float32, device)


def _pool_keys(k: Tensor, config: StemConfig, span: Span, page_table: Tensor | None) -> tuple[Tensor, Tensor]:
    """Means in the dtype of ``k`` and variances ``(batch, kv_heads, blocks, pools per block, dim)``."""
    kv_heads, dim = k.shape[-2:]
    shape = (span.batch, kv_heads, span.blocks, config.block_size // config.key_pool, dim)
    means = torch.empty(shape, dtype=k.dtype, device=k.device)
    # The interpreter, on a CPU, computes bfloat16 wrongly.
    kind = torch.float32 if k.device.type == "cpu" or k.dtype == torch.float32 else torch.bfloat16
    variances = torch.empty(shape, dtype=kind, device=k.device) if config.spread else means
    packed = span.cu_k is not None and page_table is None
    pool_key_means[(span.blocks, kv_heads, span.batch)](
        k, means, variances, span.cu_k, page_table, *((0, *k.stride()[:2]) if packed else k.stride()[:3]),
        page_table.stride(0) if page_table is not None else 0, k.shape[0], span.kv_len, span.blocks,
        B=config.block_size, P=config.key_pool, D=dim, BD=triton.next_power_of_2(dim), SPREAD=config.spread > 0,
        RAGGED=span.cu_k is not None, PAGE=k.shape[1] if page_table is not None else 0,
        num_warps=_pool_warps(config.key_pool, triton.next_power_of_2(dim)),
    )  # fmt: skip
    return means, variances


def _pool_warps(pool: int, dim: int) -> int:
    """One, as long as its registers hold a pool: by far the fastest that was measured."""
    return max(1, pool * dim // 4096)
