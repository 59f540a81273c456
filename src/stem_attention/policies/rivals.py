"""Scores of other methods: XAttention's antidiagonals (arXiv 2503.16428), FlashPrefill's mean keys (arXiv 2603.06199)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stem_attention.blocks import BlockGrid, block_count
from stem_attention.policies.base import Policy, check_divides, check_number
from stem_attention.policies.mass import pool
from stem_attention.policies.metric import accumulator_dtype, capped, exact_dtype, grouped_product, runs
from stem_attention.policies.ranked import Ranked, in_runs
from stem_attention.selection import BlockSelection

# Logits held at a time, in elements (64 MiB in fp32); while their exponentials are summed there are three of them.
_WORKSPACE = 1 << 24


@dataclass(frozen=True)
class XAttention(Policy):
    """Keep the fewest blocks that cover a share of the mass.

    A tile of ``stride`` x ``stride`` positions is scored by the mean of its antidiagonal. A softmax over the causal tiles
    of each tile row gives masses, which are summed per block pair. Block 0 and the diagonal are always kept and their mass
    counts; the heaviest others follow until ``threshold`` of the row's mass is reached, so heads keep different numbers.
    Tiles lie on absolute positions: chunks that end on block borders select what one call selects.

    Attributes:
        stride: Tokens per tile side.
        threshold: Share of the mass to cover, above 0 and at most 1.
        block_size: Tokens per block. A multiple of ``stride``.
    """

    name = "xattention"

    stride: int = 16
    threshold: float = 0.9
    block_size: int = 128

    def check(self) -> None:
        check_divides(self, "stride")
        check_number(self, "threshold", 0.0, 1.0, above=True)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, prompt_len: int | None = None,
        softcap: float | None = None,
    ) -> BlockSelection:  # fmt: skip
        (batch, _, heads, dim), grid = q.shape, BlockGrid.of(q, k, self.block_size)
        mask = torch.zeros(batch, heads, grid.rows, grid.key_blocks, dtype=torch.bool, device=q.device)
        for row, mass in self.masses(q, k, dim**-0.5 if scale is None else scale, softcap):
            mask[:, :, row - grid.first_row, : row + 1] = cover(mass, self.threshold)
        return BlockSelection.from_mask(mask, block_size=self.block_size, q_len=grid.q_len, kv_len=grid.kv_len)

    def masses(self, q: Tensor, k: Tensor, scale: float, softcap: float | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yield every query block and its estimated masses ``(batch, q_heads, row + 1)``; they sum to its tile rows.

        One row at a time: all of them at once would be an ``(N / stride)^2`` tensor.
        """
        stride, grid, k_tiles = self.stride, BlockGrid.of(q, k, self.block_size), self._tiles(k, 0).flatten(3)
        per_block = self.block_size // stride
        for row in range(grid.first_row, grid.end_row):
            low, high = grid.row_positions(row)
            first = row * per_block
            tiles = torch.arange(low // stride, block_count(high, stride), device=q.device)  # those with queries
            present = (tiles + 1).mul(stride).clamp(max=high) - tiles.mul(stride).clamp(min=low)
            q_tiles = self._tiles(q[:, grid.query_slice(row, row + 1)], low % self.block_size).flip(3).flatten(3)
            logits = grouped_product(q_tiles[:, :, tiles - first], k_tiles[:, :, : first + per_block])
            later = torch.arange(logits.shape[3], device=q.device) > tiles[:, None]
            logits = capped(logits * (scale / present[:, None]), softcap)
            mass = logits.masked_fill(later, -torch.inf).softmax(-1).sum(2)
            yield row, torch.unflatten(mass, 2, (-1, per_block)).sum(3)

    def _tiles(self, x: Tensor, before: int) -> Tensor:
        """``(batch, heads, tiles, stride, dim)``, in whole blocks; absent tokens are zero."""
        return runs(x, before, self.block_size, self.stride).to(accumulator_dtype(x)).permute(0, 3, 1, 2, 4)


def cover(mass: Tensor, threshold: float) -> Tensor:
    """Find the fewest blocks, first and last among them, that hold ``threshold`` of each row's mass; ties to the smaller id.

    ``mass`` is ``(..., blocks)``, not negative; the mask that is returned has its shape. A NaN keeps everything, so what dense
    attention would poison stays visible.
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


@dataclass(frozen=True)
class XAttentionTopK(Ranked):
    """Keep the blocks of most mass by XAttention's estimate, under a budget.

    With a threshold every head keeps as much as it needs and nobody knows beforehand how much. Here the same masses rank
    the blocks and a budget says how many are kept, so that the two scores can be compared at equal density.

    Attributes:
        stride: Tokens per tile side. It divides ``block_size``.

    For ``block_size`` and the fields that follow see :class:`stem_attention.policies.Ranked`.
    """

    name = "xattention-topk"

    stride: int = 16

    def check(self) -> None:
        super().check()
        check_divides(self, "stride")

    def scores(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        return in_runs(XAttention(self.stride, block_size=self.block_size).masses(q, k, scale, softcap))


@dataclass(frozen=True)
class FlashPrefillTopK(Ranked):
    """Rank blocks by FlashPrefill's score, under a budget.

    A block's score is the sum of ``exp(scale * q · mean key)`` over the queries of the row, as in the authors' code; here its
    logarithm, which ranks alike. The sum is over unlike queries as they are: no query's exponentials are divided by their own
    total, so those with large logits decide. A query counts for a block from the block's last token on. FlashPrefill itself
    keeps every block within a factor of the row's best; here a budget says how many are kept. For the fields see
    :class:`stem_attention.policies.Ranked`.
    """

    name = "flashprefill-topk"

    def scores(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        size, (batch, _, q_heads, _), grid = self.block_size, q.shape, BlockGrid.of(q, k, self.block_size)
        keys = pool(k, 0, size, size)[0].to(exact_dtype(q))
        ends = torch.arange(1, keys.shape[2] + 1, device=q.device) * size
        step = max(1, _WORKSPACE // (batch * q_heads * size * grid.end_row))
        for row in range(grid.first_row, grid.end_row, step):
            stop = min(row + step, grid.end_row)
            low, high = grid.row_positions(row)[0], grid.row_positions(stop - 1)[1]
            queries = runs(q[:, grid.query_slice(row, stop)], low, size, size).flatten(1, 2).transpose(1, 2)
            logits = capped(grouped_product(queries.to(keys.dtype) * scale, keys[:, :, :stop]), softcap)
            positions = torch.arange(row * size, stop * size, device=q.device)[:, None]
            absent = (positions < low) | (positions >= high)
            logits.masked_fill_(absent | (ends[:stop] > positions + 1), -torch.inf)
            yield row, torch.unflatten(logits, 2, (-1, size)).logsumexp(3)
