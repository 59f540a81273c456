"""Counters of what the plug-in has done so far in this process."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stem_attention.integrations.serving.rows import Row, SparseRows


@dataclass
class Counters:
    """Rows are requests in a step: a prompt read in three chunks counts three times, every answered token once.

    Attributes:
        sparse_rows: Rows that took Stem.
        sparse_tokens: Their tokens.
        dense_rows: Rows that the host's attention ran, by reason.
        causal_blocks: Block pairs that dense attention would have read in the sparse rows, of all heads and layers.
    """

    sparse_rows: int = 0
    sparse_tokens: int = 0
    dense_rows: Counter[str] = field(default_factory=Counter)
    causal_blocks: int = 0
    _known: int = 0
    _on_devices: dict[torch.device, Tensor] = field(default_factory=dict)

    def count_sparse(self, rows: Sequence[Row]) -> None:
        """Count rows of a step that take Stem."""
        self.sparse_rows += len(rows)
        self.sparse_tokens += sum(row.q_len for row in rows)

    def count_layer(self, rows: SparseRows, heads: int) -> Tensor | None:
        """Count what ``heads`` heads of a layer read of sparse rows; where the device alone knows, return where it adds it."""
        self.causal_blocks += heads * rows.causal_blocks
        if rows.kept_blocks is not None:
            self._known += heads * rows.kept_blocks
            return None
        device = rows.batch.cu_q.device
        if device not in self._on_devices:
            self._on_devices[device] = torch.zeros(1, dtype=torch.int64, device=device)
        return self._on_devices[device]

    @property
    def kept_blocks(self) -> int:
        """Those of the causal block pairs that sparse rows kept. Waits for a GPU that knows of some."""
        return self._known + sum(int(kept) for kept in self._on_devices.values())

    @property
    def density(self) -> float:
        """Kept share of the causal block pairs in the sparse rows; 1 before there are any. Waits as :attr:`kept_blocks`."""
        return self.kept_blocks / self.causal_blocks if self.causal_blocks else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return them as plain JSON types."""
        names = ("sparse_rows", "sparse_tokens", "causal_blocks", "kept_blocks", "density")
        return {**{name: getattr(self, name) for name in names}, "dense_rows": dict(self.dense_rows)}

    def reset(self) -> None:
        """Start again from nothing."""
        self.__init__()  # type: ignore[misc]

    def __str__(self) -> str:
        dense = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dense_rows.items())) or "none"
        return (
            f"{self.sparse_rows} rows ({self.sparse_tokens} tokens) took Stem and read {self.density:.3f} of their causal "
            f"blocks; rows left to the host: {dense}"
        )


COUNTERS = Counters()
"""Those of this process."""
