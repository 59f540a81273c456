"""Stem: Output-Aware Metric scores, Token Position-Decay budgets, in eager torch on any device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stem_attention.config import StemConfig
from stem_attention.policies.budget import block_count, ranked_budgets, row_budgets
from stem_attention.policies.choose import choose, merge_forced
from stem_attention.policies.metric import accumulator_dtype, group_sums, magnitude
from stem_attention.selection import PAD, BlockSelection

# Scores are computed for this many query blocks at a time: few enough to skip most of the blocks after the diagonal
# and to bound the workspace, many enough for a full-rate product.
_ROWS_PER_CHUNK = 64
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Stem:
    """The policy of :class:`stem_attention.StemConfig`; see :class:`stem_attention.policies.Policy` for the call."""

    config: StemConfig = field(default_factory=StemConfig)
    name: str = "stem"

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, prompt_len: int | None = None
    ) -> BlockSelection:
        config, kv_len, start = self.config, k.shape[1], k.shape[1] - q.shape[1]
        scale = q.shape[3] ** -0.5 if scale is None else scale
        num_blocks = block_count(kv_len if prompt_len is None else prompt_len, config.block_size)
        first_row, end_row = start // config.block_size, block_count(kv_len, config.block_size)
        budgets = row_budgets(config, num_blocks)[first_row:end_row] if q.shape[1] else ()
        shape = (q.shape[0], q.shape[2], len(budgets), max(budgets, default=0))
        indices = torch.full(shape, PAD, dtype=torch.int32, device=q.device)
        for row, scores in self._scores(q, k, v, scale, first_row, end_row):
            ids = self._choose(scores, row, num_blocks)
            indices[:, :, row - first_row : row - first_row + scores.shape[2], : ids.shape[3]] = ids
        if config.forced == "inside":
            counts = torch.tensor(budgets, dtype=torch.int32, device=q.device).expand(shape[:3]).contiguous()
        else:
            counts = (indices != PAD).sum(-1, dtype=torch.int32)
        return BlockSelection(indices, counts, config.block_size, q.shape[1], kv_len)

    def _choose(self, scores: Tensor, row: int, num_blocks: int) -> Tensor:
        config, rows = self.config, scores.shape[2]
        budgets = ranked_budgets(config, num_blocks)[row : row + rows]
        if config.forced == "inside":
            return choose(scores, row, budgets, config.sink_blocks, config.local_blocks)
        free = [min(i + 1, budget) for i, budget in enumerate(budgets, row)]
        merged = merge_forced(choose(scores, row, free, 0, 0), row, scores.shape[3], config.sink_blocks, config.local_blocks)
        return merged[..., : max(row_budgets(config, num_blocks)[row : row + rows])]

    def _scores(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, first_row: int, end_row: int
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield ``(first row, scores)`` for runs of query blocks, with just the columns that the run can see."""
        config, (batch, q_len, q_heads, _), kv_heads = self.config, q.shape, k.shape[2]
        if q_len == 0:
            return
        size, start = config.block_size, k.shape[1] - q_len
        k_sums = _exact(group_sums(k, 0, size, config.stride).flatten(3))
        value = config.beta * magnitude(v, config.magnitude, size, config.stride) if config.beta else None
        step = max(1, min(_ROWS_PER_CHUNK, _CHUNK_ELEMENTS // max(1, batch * q_heads * end_row)))
        for row in range(first_row, end_row, step):
            stop = min(row + step, end_row)
            low, high = max(row * size, start), min(stop * size, k.shape[1])
            q_sums = _exact(group_sums(q[:, low - start : high - start], low, size, config.stride).flip(3).flatten(3))
            grouped = torch.unflatten(q_sums, 1, (kv_heads, -1)).flatten(2, 3)
            route = (grouped @ k_sums[:, :, :stop].mT).to(accumulator_dtype(q))
            route = torch.unflatten(route, 2, (q_heads // kv_heads, -1))
            present = torch.tensor(
                [min((i + 1) * size, k.shape[1]) - max(i * size, start) for i in range(row, stop)], device=q.device
            )
            scores = route * (scale / (present * (size // config.stride)).to(route.dtype))[:, None]
            if value is not None:
                scores = scores + value[:, :, None, None, :stop]
            yield row, scores.flatten(1, 2)


def _exact(sums: Tensor) -> Tensor:
    """Widen the product's operands where fp64 is cheap.

    The product's rounding depends on its shape, and a chunk of a prompt has another shape than the whole. Accumulated in
    fp64 and rounded to fp32 afterwards, equal scores stay equal and chunks select what one shot selects.
    """
    return sums.double() if sums.device.type == "cpu" else sums
