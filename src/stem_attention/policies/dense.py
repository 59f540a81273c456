"""Everything causal: what the sparse policies are measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stem_attention.policies.pattern import check_counts
from stem_attention.selection import PAD, BlockSelection


@dataclass(frozen=True)
class Dense:
    """Keep every causal block; see :class:`stem_attention.policies.Policy` for the call.

    Attributes:
        block_size: Tokens per block.
    """

    name: ClassVar[str] = "dense"

    block_size: int = 128

    def __post_init__(self) -> None:
        check_counts(self, block_size=1)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, prompt_len: int | None = None
    ) -> BlockSelection:
        return keep_everything(q, k, self.block_size)


def keep_everything(q: Tensor, k: Tensor, block_size: int) -> BlockSelection:
    """The selection under which block-sparse attention is dense causal attention. Never waits for a GPU."""
    (batch, q_len, heads, _), kv_len = q.shape, k.shape[1]
    first, end = (kv_len - q_len) // block_size, -(-kv_len // block_size)
    rows = torch.arange(first, end if q_len else first, device=q.device, dtype=torch.int32)
    ids = torch.arange(end if q_len else 0, device=q.device, dtype=torch.int32)
    indices = torch.where(ids <= rows[:, None], ids, PAD).to(torch.int32).expand(batch, heads, -1, -1)
    counts = (rows + 1).expand(batch, heads, -1)
    return BlockSelection(indices.contiguous(), counts.contiguous(), block_size, q_len, kv_len)
