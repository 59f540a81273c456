"""Counters of what the plug-in has done so far in this process."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from stem_attention.blocks import BlockGrid, block_count
from stem_attention.integrations.serving.rows import Row
from stem_attention.policies import Policy


@dataclass
class Counters:
    """Rows are requests in a step: a prompt read in three chunks counts three times, every answered token once.

    Attributes:
        sparse_rows: Rows that took Stem.
        sparse_tokens: Their tokens.
        dense_rows: Rows that the host's attention ran, by reason.
        kept_blocks: Block pairs that the policy let sparse rows keep, for one head of one layer.
        causal_blocks: Block pairs that dense attention would have read there.
        is_bound: Whether fewer may have been kept: what policies such as Mass keep, only the device knows.
    """

    sparse_rows: int = 0
    sparse_tokens: int = 0
    dense_rows: Counter[str] = field(default_factory=Counter)
    kept_blocks: int = 0
    causal_blocks: int = 0
    is_bound: bool = False

    def count_sparse(self, rows: Sequence[Row], policy: Policy) -> None:
        """Count rows that take Stem."""
        for row in rows:
            blocks, grid = block_count(row.whole_len, policy.block_size), BlockGrid(row.q_len, row.kv_len, policy.block_size)
            counts = policy.row_counts(blocks)
            self.is_bound |= counts is None
            self.sparse_rows += 1
            self.sparse_tokens += row.q_len
            self.kept_blocks += sum((counts or policy.row_limits(blocks))[grid.first_row : grid.end_row])
            self.causal_blocks += grid.causal_pairs

    @property
    def density(self) -> float:
        """Kept share of the causal block pairs in the sparse rows; 1 before there are any."""
        return self.kept_blocks / self.causal_blocks if self.causal_blocks else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return them as plain JSON types."""
        return {**vars(self), "dense_rows": dict(self.dense_rows), "density": self.density}

    def reset(self) -> None:
        """Start again from nothing."""
        self.__init__()  # type: ignore[misc]

    def __str__(self) -> str:
        dense = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dense_rows.items())) or "none"
        bound = "at most " if self.is_bound else ""
        return (
            f"{self.sparse_rows} rows ({self.sparse_tokens} tokens) took Stem and read {bound}{self.density:.3f} of their "
            f"causal blocks; rows left to the host: {dense}"
        )


COUNTERS = Counters()
"""Those of this process."""
