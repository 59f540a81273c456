"""Stem: Output-Aware Metric scores, Token Position-Decay budgets, in eager torch on any device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stem_attention.config import StemConfig
from stem_attention.policies.metric import accumulator_dtype, group_sums, magnitude
from stem_attention.policies.ranked import Ranked

# Scores are computed for this many query blocks at a time: few enough to skip most of the blocks after the diagonal
# and to bound the workspace, many enough for a full-rate product.
_ROWS_PER_CHUNK = 64
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Stem(Ranked):
    """The policy of :class:`stem_attention.StemConfig`; see :class:`stem_attention.policies.Policy` for the call."""

    config: StemConfig = field(default_factory=StemConfig)
    name: str = "stem"

    def scores(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, first_row: int, end_row: int
    ) -> Iterator[tuple[int, Tensor]]:
        """The block scores of section 3, for runs of query blocks; see :meth:`Ranked.scores`."""
        config, (batch, q_len, q_heads, _), kv_heads = self.config, q.shape, k.shape[2]
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
