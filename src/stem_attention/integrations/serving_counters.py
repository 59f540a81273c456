"""What the plug-in has done so far in this process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from stem_attention.config import StemConfig
from stem_attention.integrations.serving_rows import Row
from stem_attention.policies.budget import block_count, row_budgets


@dataclass
class Counters:
    """Rows are requests in a step: a prompt read in three chunks counts three times, every answered token once.

    Attributes:
        sparse_rows: Rows that took Stem.
        sparse_tokens: Their tokens.
        dense_rows: Rows that the host's attention ran, by reason.
        kept_blocks: Block pairs that the schedule let sparse rows keep, for one head of one layer.
        causal_blocks: Block pairs that dense attention would have read there.
        is_bound: Whether fewer may have been kept: what ``forced="extra"`` and ``keep="mass"`` keep, only the device knows.
    """

    sparse_rows: int = 0
    sparse_tokens: int = 0
    dense_rows: Counter[str] = field(default_factory=Counter)
    kept_blocks: int = 0
    causal_blocks: int = 0
    is_bound: bool = False

    def count_sparse(self, rows: Sequence[Row], config: StemConfig) -> None:
        """Count rows that take Stem."""
        self.is_bound |= config.forced == "extra" or config.keep == "mass"
        for row in rows:
            blocks = block_count(max(row.prompt_len, row.kv_len), config.block_size)
            first, end = (row.kv_len - row.q_len) // config.block_size, block_count(row.kv_len, config.block_size)
            self.sparse_rows += 1
            self.sparse_tokens += row.q_len
            self.kept_blocks += sum(row_budgets(config, blocks)[first:end])
            self.causal_blocks += (end - first) * (first + 1 + end) // 2

    @property
    def density(self) -> float:
        """Kept share of the causal block pairs in the sparse rows; 1 before there are any."""
        return self.kept_blocks / self.causal_blocks if self.causal_blocks else 1.0

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        names = ("sparse_rows", "sparse_tokens", "kept_blocks", "causal_blocks", "is_bound")
        numbers = {name: getattr(self, name) for name in names}
        return {**numbers, "dense_rows": dict(self.dense_rows), "density": self.density}

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
