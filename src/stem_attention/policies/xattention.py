"""XAttention (arXiv 2503.16428): antidiagonal scores, softmax, and blocks until enough mass is covered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from stem_attention.config import StemConfig
from stem_attention.errors import bad_argument
from stem_attention.policies.metric import accumulator_dtype
from stem_attention.policies.pattern import check_counts
from stem_attention.policies.ranked import Ranked, in_runs
from stem_attention.selection import BlockSelection


@dataclass(frozen=True)
class XAttention:
    """Keep the fewest blocks that cover a share of the mass; see :class:`stem_attention.policies.Policy` for the call.

    A tile of ``stride`` x ``stride`` positions is scored by the mean of its antidiagonal. A softmax over the causal tiles
    of each tile row gives masses, which are summed per block pair. Block 0 and the diagonal are always kept and their mass
    counts; the heaviest others follow until ``threshold`` of the row's mass is reached, so heads keep different numbers.
    Tiles lie on absolute positions: chunks that end on block borders select what one call selects.

    Attributes:
        stride: Tokens per tile side.
        threshold: Share of the mass to cover, above 0 and at most 1.
        block_size: Tokens per block. A multiple of ``stride``.
    """

    name: ClassVar[str] = "xattention"

    stride: int = 16
    threshold: float = 0.9
    block_size: int = 128

    def __post_init__(self) -> None:
        check_counts(self, stride=1, block_size=1)
        if self.block_size % self.stride:
            fix = "change block_size or stride so that one divides the other"
            raise bad_argument("block_size", f"a multiple of stride={self.stride}", self.block_size, fix)
        number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
        if not number or not 0 < self.threshold <= 1:
            raise bad_argument("threshold", "a number > 0 and <= 1", repr(self.threshold), "the paper uses 0.9")

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, prompt_len: int | None = None
    ) -> BlockSelection:
        (batch, q_len, heads, dim), kv_len, size = q.shape, k.shape[1], self.block_size
        first, columns = (kv_len - q_len) // size, -(-kv_len // size)
        mask = torch.zeros(batch, heads, columns - first if q_len else 0, columns, dtype=torch.bool, device=q.device)
        for row, mass in self.masses(q, k, dim**-0.5 if scale is None else scale):
            mask[:, :, row - first, : row + 1] = cover(mass, self.threshold)
        return BlockSelection.from_mask(mask, block_size=size, q_len=q_len, kv_len=kv_len)

    def masses(self, q: Tensor, k: Tensor, scale: float) -> Iterator[tuple[int, Tensor]]:
        """Yield every query block and its estimated masses ``(batch, q_heads, row + 1)``; they sum to its tile rows.

        One row at a time: all of them at once would be an ``(N / stride)^2`` tensor.
        """
        (kv_len, q_len), size = (k.shape[1], q.shape[1]), self.block_size
        start, k_tiles = kv_len - q_len, self._tiles(k, 0)
        for row in range(start // size, -(-kv_len // size) if q_len else 0):
            low, high = max(row * size, start), min((row + 1) * size, kv_len)
            q_tiles = self._tiles(q[:, low - start : high - start], low % size, reverse=True)
            yield row, self._block_mass(q_tiles, k_tiles, scale, row, low, high)

    def _tiles(self, x: Tensor, before: int, reverse: bool = False) -> Tensor:
        """``(batch, heads, tiles, stride * dim)``, in whole blocks; absent tokens are zero."""
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, before, -(before + x.shape[1]) % self.block_size))
        tiles = torch.unflatten(x.to(accumulator_dtype(x)).transpose(1, 2), 2, (-1, self.stride))
        return (tiles.flip(3) if reverse else tiles).flatten(3)

    def _block_mass(self, q_tiles: Tensor, k_tiles: Tensor, scale: float, row: int, low: int, high: int) -> Tensor:
        """Softmax mass ``(batch, heads, row + 1)`` of query block ``row``, whose queries lie in ``[low, high)``."""
        per_block, device = self.block_size // self.stride, q_tiles.device
        tiles = torch.arange(row * per_block, -(-high // self.stride), device=device)
        tiles = tiles[low // self.stride - row * per_block :]  # a tile row without queries has no mass to give
        present = (tiles + 1).mul(self.stride).clamp(max=high) - tiles.mul(self.stride).clamp(min=low)
        q_tiles = q_tiles[:, :, tiles - row * per_block]
        grouped = torch.unflatten(q_tiles, 1, (k_tiles.shape[1], -1))
        logits = grouped.flatten(2, 3) @ k_tiles[:, :, : (row + 1) * per_block].mT
        logits = torch.unflatten(logits, 2, grouped.shape[2:4]).flatten(1, 2) * (scale / present[:, None])
        later = torch.arange(logits.shape[3], device=device) > tiles[:, None]
        mass = logits.masked_fill(later, -torch.inf).softmax(-1).sum(2)
        return torch.unflatten(mass, 2, (-1, per_block)).sum(3)


@dataclass(frozen=True)
class XAttentionTopK(Ranked):
    """XAttention's masses under Stem's budgets; see :class:`stem_attention.policies.Policy` for the call.

    With a threshold every head keeps as much as it needs and nobody knows beforehand how much. Here the same masses rank
    the blocks and ``config`` says how many are kept, so that the two scores can be compared at equal density.

    Attributes:
        config: Budgets, forced blocks, tail, and the ``stride`` of the tiles; ``beta`` and ``magnitude`` mean nothing here.
    """

    name: ClassVar[str] = "xattention-topk"

    config: StemConfig = field(default_factory=StemConfig)

    def scores(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, first_row: int, end_row: int
    ) -> Iterator[tuple[int, Tensor]]:
        """Estimated masses; see :meth:`Ranked.scores`."""
        return in_runs(XAttention(self.config.stride, block_size=self.config.block_size).masses(q, k, scale))


def cover(mass: Tensor, threshold: float) -> Tensor:
    """The fewest blocks, first and last among them, that hold ``threshold`` of each row's mass; ties to the smaller id.

    Args:
        mass: ``(..., blocks)``, not negative. A NaN keeps everything, so what dense attention would poison stays visible.
        threshold: Share of the mass, above 0 and at most 1.

    Returns:
        Bool mask like ``mass``.
    """
    ranked = mass.clone()
    ranked[..., 0] = ranked[..., -1] = torch.inf
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    # What is still missing before a block, summed from the lightest end, where rounding is smallest.
    missing = mass.gather(-1, order).flip(-1).cumsum(-1).flip(-1)
    reached = missing <= (1 - threshold) * missing[..., :1]
    kept = torch.zeros_like(reached).scatter_(-1, order, ~reached)
    kept[..., 0] = kept[..., -1] = True
    return kept
