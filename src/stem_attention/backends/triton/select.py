"""Launch of the selection: pool, score, choose, a bounded run of query blocks at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from stem_attention.backends.ragged import Ragged
from stem_attention.backends.triton.choose import device_ints
from stem_attention.backends.triton.choose import launch as launch_choice
from stem_attention.backends.triton.launch import score_launch
from stem_attention.backends.triton.pool_kernels import pool_keys, pool_queries
from stem_attention.backends.triton.score_kernel import score_kernel
from stem_attention.config import StemConfig
from stem_attention.policies.budget import block_count, ranked_budgets, row_budgets
from stem_attention.policies.metric import zscore_magnitude

# Pooled queries and scores of one run of query blocks.
_WORKSPACE_BYTES = 128 << 20


@dataclass(frozen=True)
class _Span:
    """Sizes and strides of a batch, as the kernels take them."""

    batch: int
    rows: int
    blocks: int
    q_len: int
    kv_len: int
    first: int
    cu_q: Tensor | None
    cu_k: Tensor | None
    q_strides: tuple[int, ...]

    @classmethod
    def of(cls, q: Tensor, k: Tensor, size: int, ragged: Ragged | None, page_table: Tensor | None) -> _Span:
        if ragged is None:
            kv_len = k.shape[1] if page_table is None else 0
            first, blocks = (kv_len - q.shape[1]) // size, block_count(kv_len, size)
            rows = blocks - first if q.shape[1] else 0
            return cls(q.shape[0], rows, blocks, q.shape[1], kv_len, first, None, None, q.stride()[:3])
        rows = block_count(ragged.max_q - 1, size) + 1 if ragged.max_q else 0  # a sequence may start inside a block
        blocks = block_count(ragged.max_k, size)
        return cls(ragged.sequences, rows, blocks, 0, 0, 0, ragged.cu_q, ragged.cu_k, (0, *q.stride()[:2]))


def _scored(config: StemConfig, blocks: int, dense: bool) -> Sequence[int]:
    """What the choose kernel is asked for in each row of a prompt."""
    return range(1, blocks + 1) if dense else ranked_budgets(config, blocks)


@lru_cache(maxsize=256)
def _list_width(config: StemConfig, blocks: int, dense: bool, first: int, end: int, implicit: bool) -> int:
    """The longest list that must be written for rows ``first`` to ``end`` of a prompt of ``blocks`` blocks."""
    scored = _scored(config, blocks, dense)
    most = row_budgets(config, blocks)
    return max((most[row] for row in range(first, min(end, blocks)) if not (implicit and scored[row] > row)), default=1)


@lru_cache(maxsize=64)
def _budget_table(config: StemConfig, prompts: tuple[tuple[int, bool], ...], device: torch.device) -> Tensor:
    """int32 ``(prompts, longest)``, the numbers of :func:`_scored`."""
    return device_ints([_scored(config, blocks, dense) for blocks, dense in prompts], device)


def _pool_keys(
    k: Tensor, v: Tensor, config: StemConfig, span: _Span, split: bool, page_table: Tensor | None
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


def select(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig,
    scale: float,
    prompt_lens: Sequence[int],
    *,
    implicit: bool = False,
    dense_below: int = 0,
    ragged: Ragged | None = None,
    page_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Indices and counts of the blocks that ``config`` keeps.

    Args:
        q: As in :func:`stem_attention.backends.triton.attention.attend`, likewise ``k``, ``v``, ``ragged``, ``page_table``.
        k: Keys.
        v: Values.
        config: What to keep.
        scale: Softmax scale.
        prompt_lens: Whole prompt length of each sequence; one entry when they are all the same.
        implicit: Rows that keep everything get no list, so that two dense tail rows do not widen all others.
        dense_below: Prompts of fewer tokens keep everything.
        ragged: Borders of a packed batch.
        page_table: int32 ``(batch, max_pages)``.
    """
    size, stride, dim, heads, kv_heads = config.block_size, config.stride, q.shape[-1], q.shape[-2], k.shape[-2]
    span = _Span.of(q, k, size, ragged, page_table)
    prompts = tuple((block_count(length, size), length < dense_below) for length in prompt_lens)
    width = max(_list_width(config, *prompt, span.first, span.blocks, implicit) for prompt in prompts)
    indices = q.new_empty((span.batch, heads, span.rows, width), dtype=torch.int32)
    counts = q.new_empty((span.batch, heads, span.rows), dtype=torch.int32)
    budgets = _budget_table(config, prompts, q.device)
    budget_stride = budgets.shape[1] if len(prompt_lens) > 1 else 0
    split = q.dtype in (torch.bfloat16, torch.float16) and q.device.type == "cuda"
    k_high, k_low, value = _pool_keys(k, v, config, span, split, page_table)
    tile = score_launch(q.device)
    pitch = triton.cdiv(span.blocks, 16) * 16  # rows that begin at aligned addresses: else the score kernel spills
    pooled: dict[str, Any] = {"dtype": torch.bfloat16 if split else torch.float32, "device": q.device}
    per_row = span.batch * heads * (stride * dim + pitch) * 4
    step = max(1, min(span.rows, _WORKSPACE_BYTES // per_row))
    step = step // tile.rows * tile.rows or step  # whole tiles, when there is room for one
    q_high = torch.empty((span.batch, heads, step, stride * dim), **pooled)
    q_low = torch.empty_like(q_high) if split else q_high
    scores = q.new_empty((span.batch, heads, step, pitch), dtype=torch.float32)
    common: dict[str, Any] = {"B": size, "RAGGED": ragged is not None}
    for first in range(0, span.rows, step):
        rows = min(step, span.rows - first)
        seen = min(span.blocks, span.first + first + rows) if ragged is None else span.blocks
        pool_queries[(rows, heads, span.batch)](
            q, q_high, q_low, span.cu_q, span.cu_k, *span.q_strides, span.q_len, span.kv_len, first, rows,
            S=stride, D=dim, BD=triton.next_power_of_2(dim), SPLIT=split, num_warps=2 if dim <= 128 else 4, **common,
        )  # fmt: skip
        tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(span.blocks, tile.columns)
        score_kernel[(tiles, heads, span.batch)](
            q_high, q_low, k_high, k_low, value, scores, span.cu_q, span.cu_k, span.q_len, span.kv_len, first, rows,
            span.blocks, pitch, scale, WIDTH=stride * dim, R=size // stride, G=heads // kv_heads, BM=tile.rows, BN=tile.columns,
            BK=tile.inner, SPLIT=split, num_warps=tile.warps, num_stages=tile.stages, **common,
        )  # fmt: skip
        launch_choice(
            scores, budgets, indices, counts, span.batch, heads, span.cu_q, span.cu_k, budget_stride, span.q_len, span.kv_len,
            first, rows, span.rows, pitch, width, seen, SINK=config.sink_blocks, LOCAL=config.local_blocks,
            EXTRA=config.forced == "extra", IMPLICIT=implicit, **common,
        )  # fmt: skip
    return indices, counts
