"""Stem: Output-Aware Metric scores, Token Position-Decay budgets, in eager torch on any device."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from stem_attention.blocks import BlockGrid
from stem_attention.policies.base import check_choice, check_divides, check_number
from stem_attention.policies.metric import accumulator_dtype, capped, exact_dtype, group_sums, grouped_product, magnitude
from stem_attention.policies.ranked import Ranked

# Scores are computed for this many query blocks at a time: few enough to skip most of the blocks after the diagonal
# and to bound the workspace, many enough for a full-rate product.
_ROWS_PER_CHUNK = 64
_CHUNK_ELEMENTS = 1 << 22

# The published method forces four blocks at either end and has no dense tail.
_PUBLISHED: dict[str, Any] = {"sink_blocks": 4, "local_blocks": 4, "tail_blocks": 0}


@dataclass(frozen=True)
class Stem(Ranked):
    """Rank blocks by relevance and by what they carry, early rows with the largest budgets (arXiv 2603.06274).

    ``Stem()`` smooths the published schedule and adds a dense tail; :meth:`paper` is the method as published. What is given to
    one of the presets overrides its fields.

    Attributes:
        stride: Stride ``s`` of the antidiagonal pooling of the routing score. It divides ``block_size``.
        beta: Weight of the value magnitude in the block score. 0 is the score-aware metric of earlier methods.
        magnitude: ``"log"``: largest ``max(0, ln |v|)`` of the block. ``"zscore"``: the public code's normalised
            variant; it looks at the whole sequence, so it is *not* chunk-invariant. ``"none"``: no value term.

    For ``block_size`` and the fields that follow see :class:`stem_attention.policies.Ranked`.
    """

    name = "stem"

    stride: int = 16
    beta: float = 0.2
    magnitude: str = "log"

    @classmethod
    def paper(cls, **changes: Any) -> Self:
        """Build the published method: ratio 0.2 up to 16384 tokens and 0.1 beyond, 4 + 4 forced blocks, no dense tail."""
        return cls(**{**_PUBLISHED, "schedule": "step", **changes})

    @classmethod
    def angelslim(cls, **changes: Any) -> Self:
        """Build what the authors' public code (Tencent AngelSlim) runs.

        Its knee lies at 160 blocks of 128 tokens. Its z-score magnitude is not chunk-invariant. The public code also leaves
        the first two layers of a model dense: that is a host's setting, ``dense_layers=2``.
        """
        preset = {"schedule": "angelslim", "magnitude": "zscore", "forced": "extra", "stride": 8, "knee_tokens": 160 * 128}
        return cls(**{**_PUBLISHED, **preset, **changes})

    @classmethod
    def uniform(cls, **changes: Any) -> Self:
        """Build the top-k of earlier methods: every row has the same budget, and values do not count.

        With ``ratio_short=0.17, ratio_long=0.085`` it has about the compute of ``Stem()``, as in the paper's ablation.
        """
        return cls(**{"decay": 1.0, "beta": 0.0, "tail_blocks": 0, **changes})

    def check(self) -> None:
        super().check()
        check_number(self, "beta")
        check_choice(self, "magnitude", ("log", "zscore", "none"))
        check_divides(self, "stride")

    def scores(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Score as section 3 of the method says, the routing score under the soft cap; see :meth:`Ranked.scores`."""
        size, (batch, _, q_heads, _), grid = self.block_size, q.shape, BlockGrid.of(q, k, self.block_size)
        k_sums = group_sums(k, 0, size, self.stride).flatten(3).to(exact_dtype(q))
        value = None
        if self.beta and self.magnitude != "none":
            value = self.beta * magnitude(v, self.magnitude, size, self.stride)
            value = value.repeat_interleave(q_heads // k.shape[2], 1)[:, :, None]
        step = max(1, min(_ROWS_PER_CHUNK, _CHUNK_ELEMENTS // max(1, batch * q_heads * grid.end_row)))
        for row in range(grid.first_row, grid.end_row, step):
            stop = min(row + step, grid.end_row)
            spans = [grid.row_positions(i) for i in range(row, stop)]
            q_sums = group_sums(q[:, grid.query_slice(row, stop)], spans[0][0], size, self.stride)
            q_sums = q_sums.flip(3).flatten(3).to(exact_dtype(q))
            route = grouped_product(q_sums, k_sums[:, :, :stop]).to(accumulator_dtype(q))
            present = torch.tensor([high - low for low, high in spans], device=q.device)
            scores = capped(route * (scale / (present * (size // self.stride)).to(route.dtype))[:, None], softcap)
            yield row, scores if value is None else scores + value[..., :stop]
