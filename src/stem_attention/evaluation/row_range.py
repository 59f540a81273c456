"""A policy confined to some query blocks, to see what an error there costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stem_attention.errors import bad_argument
from stem_attention.policies import Policy
from stem_attention.policies.budget import block_count
from stem_attention.selection import BlockSelection


def row_range(rows: tuple[float, float], num_blocks: int) -> range:
    """The query blocks that a share of a prompt means: ``(0, 0.25)`` is its first quarter."""
    return range(*(round(share * num_blocks) for share in rows))


@dataclass(frozen=True)
class RowRange:
    """Another policy in some query blocks, everything in all others; see :class:`stem_attention.policies.Policy`.

    Attributes:
        policy: What selects inside the range.
        rows: The range as shares of the whole prompt, ``0 <= low < high <= 1``.
    """

    policy: Policy
    rows: tuple[float, float]

    def __post_init__(self) -> None:
        if not 0 <= self.rows[0] < self.rows[1] <= 1:
            raise bad_argument("rows", "0 <= low < high <= 1", self.rows, "(0, 0.25) is the first quarter of a prompt")

    @property
    def name(self) -> str:
        """The inner policy's name and the range."""
        return f"{self.policy.name} in rows {self.rows[0]:g} to {self.rows[1]:g}"

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, prompt_len: int | None = None
    ) -> BlockSelection:
        inner = self.policy(q, k, v, scale=scale, prompt_len=prompt_len)
        sparse = row_range(self.rows, block_count(k.shape[1] if prompt_len is None else prompt_len, inner.block_size))
        columns = torch.arange(inner.key_blocks, device=q.device)
        rows = columns[inner.first_row : inner.first_row + inner.rows, None]
        dense = ((rows < sparse.start) | (rows >= sparse.stop)) & (columns <= rows)
        return BlockSelection.from_mask(
            inner.to_mask() | dense, block_size=inner.block_size, q_len=inner.q_len, kv_len=inner.kv_len
        )
