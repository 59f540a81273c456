"""A policy confined to some query blocks, to see what an error there costs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from stem_attention import BlockSelection, Policy
from stem_attention.blocks import block_count
from stem_attention.errors import bad_argument


@dataclass(frozen=True)
class RowRange(Policy):
    """Another policy in some query blocks, everything in all others.

    Attributes:
        policy: What selects inside the range.
        low: Where the range begins, as a share of the whole prompt.
        high: Where it ends, ``0 <= low < high <= 1``.
    """

    name: ClassVar[str] = "row-range"

    policy: Policy
    low: float
    high: float

    def check(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            fix = "0 and 0.25 are the first quarter of a prompt"
            raise bad_argument("rows", "0 <= low < high <= 1", (self.low, self.high), fix)

    @property
    def block_size(self) -> int:  # type: ignore[override]
        """The inner policy's."""
        return self.policy.block_size

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, prompt_len: int | None = None
    ) -> BlockSelection:
        inner = self.policy(q, k, v, scale=scale, prompt_len=prompt_len)
        sparse = self._rows(block_count(k.shape[1] if prompt_len is None else prompt_len, self.block_size))
        columns = torch.arange(inner.key_blocks, device=q.device)
        rows = columns[inner.first_row : inner.first_row + inner.rows, None]
        dense = ((rows < sparse.start) | (rows >= sparse.stop)) & (columns <= rows)
        sizes = {"block_size": inner.block_size, "q_len": inner.q_len, "kv_len": inner.kv_len}
        return BlockSelection.from_mask(inner.to_mask() | dense, **sizes)

    def row_counts(self, num_blocks: int) -> tuple[int, ...] | None:
        counts, sparse = self.policy.row_counts(num_blocks), self._rows(num_blocks)
        return None if counts is None else tuple(counts[row] if row in sparse else row + 1 for row in range(num_blocks))

    def density(self, tokens: int) -> float | None:
        """Kept share of the causal block pairs of the sparse rows alone: this is what a density is tuned to."""
        num_blocks = block_count(tokens, self.block_size)
        counts, rows = self.row_counts(num_blocks), self._rows(num_blocks)
        return None if counts is None else sum(counts[row] for row in rows) / max(1, sum(row + 1 for row in rows))

    def resized(self, size: int, blocks: int, density: float) -> RowRange:
        return replace(self, policy=self.policy.resized(size, blocks, density))

    def to_dict(self) -> dict[str, Any]:
        return {**self.policy.to_dict(), "rows": [self.low, self.high]}

    def _rows(self, num_blocks: int) -> range:
        return range(round(self.low * num_blocks), round(self.high * num_blocks))
