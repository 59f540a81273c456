"""Launch of the selection: pool, score, choose, a bounded run of query blocks at a time; or keep by mass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
from torch import Tensor

from stem_attention.backends.ragged import Ragged
from stem_attention.backends.triton.choose import launch as launch_choice
from stem_attention.backends.triton.masses import keep_by_mass
from stem_attention.backends.triton.routes import Routes
from stem_attention.backends.triton.span import Span
from stem_attention.backends.triton.tables import device_table, kept_per_stream
from stem_attention.config import StemConfig
from stem_attention.policies.budget import block_count, ranked_budgets, row_budgets

# Pooled queries and scores of one run of query blocks.
_WORKSPACE_BYTES = 128 << 20


def _scored(config: StemConfig, blocks: int, dense: bool) -> Sequence[int]:
    """What the choice by budgets is asked for in each row of a prompt."""
    return range(1, blocks + 1) if dense else ranked_budgets(config, blocks)


def _list_width(config: StemConfig, blocks: int, dense: bool, first: int, end: int, implicit: bool) -> int:
    """The longest list that must be written for rows ``first`` to ``end`` of a prompt of ``blocks`` blocks."""
    if config.keep == "budget":
        return _budgeted_width(config, blocks, dense, first, end, implicit)
    unlisted = (blocks if dense else config.tail_blocks) if implicit else 0
    last = min(end, blocks - unlisted)
    return last if last > first else 1


@lru_cache(maxsize=256)
def _budgeted_width(config: StemConfig, blocks: int, dense: bool, first: int, end: int, implicit: bool) -> int:
    most, scored = row_budgets(config, blocks), _scored(config, blocks, dense)
    rows = range(first, min(end, blocks))
    return max((most[row] for row in rows if not implicit or scored[row] <= row), default=1)


@kept_per_stream
def _budget_table(device: torch.device, config: StemConfig, prompts: tuple[tuple[int, bool], ...]) -> Tensor:
    """int32 ``(prompts, longest)``, the numbers of :func:`_scored`."""
    return device_table([_scored(config, blocks, dense) for blocks, dense in prompts], torch.int32, device)


@kept_per_stream
def _prompt_table(device: torch.device, prompts: tuple[tuple[int, bool], ...]) -> Tensor:
    """int32 ``(prompts, 1)``: the blocks of each prompt, 0 for a dense one. The same for all layers."""
    return device_table([[0 if dense else blocks] for blocks, dense in prompts], torch.int32, device)


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
    size, heads = config.block_size, q.shape[-2]
    span = Span.of(q, k, size, ragged, page_table)
    prompts = tuple((block_count(length, size), length < dense_below) for length in prompt_lens)
    width = max(_list_width(config, *prompt, span.first, span.blocks, implicit) for prompt in prompts)
    indices = q.new_empty((span.batch, heads, span.rows, width), dtype=torch.int32)
    counts = q.new_empty((span.batch, heads, span.rows), dtype=torch.int32)
    if config.keep == "mass":
        table = _prompt_table(q.device, prompts)
        keep_by_mass(q, k, config, scale, span, page_table, table, indices, counts, implicit=implicit)
        return indices, counts
    budgets = _budget_table(q.device, config, prompts)
    budget_stride = budgets.shape[1] if len(prompt_lens) > 1 else 0
    routes = Routes(q, k, v, config, scale, span, page_table)
    pitch = triton.cdiv(span.blocks, 16) * 16  # rows that begin at aligned addresses: else the score kernel spills
    step = max(1, min(span.rows, _WORKSPACE_BYTES // (span.batch * heads * (routes.row_bytes + pitch * 4))))
    step = step // routes.row_multiple * routes.row_multiple or step  # whole tiles, when there is room for one
    routes.reserve(step)
    scores = q.new_empty((span.batch, heads, step, pitch), dtype=torch.float32)
    for first in range(0, span.rows, step):
        rows = min(step, span.rows - first)
        seen = min(span.blocks, span.first + first + rows) if ragged is None else span.blocks
        routes.write(scores, first, rows)
        launch_choice(
            scores, budgets, indices, counts, span.batch, heads, span.cu_q, span.cu_k, budget_stride, span.q_len, span.kv_len,
            first, rows, span.rows, pitch, width, seen, SINK=config.sink_blocks, LOCAL=config.local_blocks,
            EXTRA=config.forced == "extra", IMPLICIT=implicit, B=size, RAGGED=ragged is not None,
        )  # fmt: skip
    return indices, counts
