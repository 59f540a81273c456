"""The oracle: blocks ranked by the attention mass that they truly hold. It costs more than dense attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from stem_attention.config import StemConfig
from stem_attention.policies.metric import accumulator_dtype
from stem_attention.policies.ranked import Ranked, in_runs

# Weights held at a time, in elements (64 MiB in fp32; while the softmax runs there are two of them).
_WORKSPACE = 1 << 24


@dataclass(frozen=True)
class Oracle(Ranked):
    """Stem's budgets, spent on the heaviest blocks; see :class:`stem_attention.policies.Policy` for the call.

    A block's score is its softmax mass in exact dense attention, averaged over the query block's rows, head by head: what
    any cheap score could hope to guess. It is meant as an upper bound in comparisons and never for speed.

    Attributes:
        config: Budgets, forced blocks and tail; fields that belong to Stem's own score (``stride``, ``beta``,
            ``magnitude``) mean nothing here.
    """

    name: ClassVar[str] = "oracle"

    config: StemConfig = field(default_factory=StemConfig)

    def scores(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, first_row: int, end_row: int
    ) -> Iterator[tuple[int, Tensor]]:
        """True masses; see :meth:`Ranked.scores`."""
        rows = range(first_row, end_row)
        return in_runs((row, block_mass(q, k, scale, self.config.block_size, row)) for row in rows)


def block_mass(q: Tensor, k: Tensor, scale: float, block_size: int, row: int) -> Tensor:
    """Share of dense causal attention that one query block gives to each key block, averaged over its rows.

    Args:
        q: ``(batch, q_len, q_heads, dim)``, the last ``q_len`` of the positions.
        k: ``(batch, kv_len, kv_heads, dim)``.
        scale: Softmax scale.
        block_size: Tokens per block.
        row: Absolute query block; one that ``q`` has rows of.

    Returns:
        ``(batch, q_heads, row + 1)`` in fp32 (fp64 for fp64 input); sums to 1 over the blocks.
    """
    (batch, q_len, _, _), (kv_len, kv_heads), dtype = q.shape, k.shape[1:3], accumulator_dtype(q)
    start = kv_len - q_len
    low, high = max(row * block_size, start), min((row + 1) * block_size, kv_len)
    queries = torch.unflatten(q[:, low - start : high - start].to(dtype) * scale, 2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
    group = queries.shape[2]
    room = max(1, _WORKSPACE // (batch * (high - low) * high))  # query heads
    outer, inner = max(1, room // group), min(room, group)
    masses = []
    for g in range(0, kv_heads, outer):
        keys = k[:, :high, g : g + outer].to(dtype).permute(0, 2, 3, 1)
        parts = [_group_mass(queries[:, g : g + outer, h : h + inner], keys, low, block_size) for h in range(0, group, inner)]
        masses.append(torch.cat(parts, 2))
    return torch.cat(masses, 1).flatten(1, 2)


def _group_mass(queries: Tensor, keys: Tensor, low: int, block_size: int) -> Tensor:
    """Masses ``(batch, kv_heads, heads, blocks)`` of queries ``(batch, kv_heads, heads, rows, dim)`` from position ``low``."""
    (heads, rows), high = queries.shape[2:4], keys.shape[3]
    weights = torch.unflatten(queries.flatten(2, 3) @ keys, 2, (heads, rows))
    future = torch.ones(rows, high - low, dtype=torch.bool, device=keys.device).triu(1)
    weights[..., low:].masked_fill_(future, -torch.inf)
    mean = torch.softmax(weights, -1).mean(3)
    padded = torch.nn.functional.pad(mean, (0, -high % block_size))
    return torch.unflatten(padded, 3, (-1, block_size)).sum(4)
