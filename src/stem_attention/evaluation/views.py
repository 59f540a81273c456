"""What a policy keeps in one layer and head, next to the scores that Stem gives the blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stem_attention.backends.reference.select import block_magnitude, block_scores
from stem_attention.config import StemConfig
from stem_attention.evaluation.prefill import AttentionCall, Reading
from stem_attention.selection import BlockSelection


@dataclass(frozen=True, eq=False)
class BlockView:
    """One head of one layer.

    Attributes:
        layer: Index of the layer.
        head: Index of the query head.
        kept: Bool ``(rows, key_blocks)``, True where a block is kept.
        scores: ``(rows, key_blocks)``, Stem's block scores; NaN after the diagonal.
    """

    layer: int
    head: int
    kept: Tensor
    scores: Tensor

    @property
    def kept_blocks(self) -> int:
        """Block pairs that are kept."""
        return int(self.kept.sum())

    @property
    def density(self) -> float:
        """Kept block pairs over causal ones. The view is of a whole prompt, so rows and columns start at the same block."""
        rows = len(self.kept)
        return self.kept_blocks / (rows * (rows + 1) // 2)

    @property
    def median_distance(self) -> float:
        """Median distance of a kept block from its row's diagonal, in blocks."""
        return _median_distance(self.kept)


class HeadRecorder:
    """Keeps q, k and v of chosen layers and heads while a model reads; pass it as ``on_attention``."""

    def __init__(self, layers: list[int], heads: list[int], config: StemConfig) -> None:
        self._layers, self._heads, self._config = layers, heads, config
        self._seen: dict[tuple[int, int], _Head] = {}

    def __call__(self, call: AttentionCall) -> None:
        """Copy the chosen heads, if the call is of a chosen layer. Scoring waits until the clock has stopped."""
        if call.layer in self._layers:
            group = call.q.shape[1] // call.k.shape[1]
            for head in self._heads:
                q, k, v = (x[0, i].clone() for x, i in ((call.q, head), (call.k, head // group), (call.v, head // group)))
                self._seen[call.layer, head] = _Head(q, k, v, q.shape[1] ** -0.5 if call.scale is None else call.scale)

    def views(self, reading: Reading) -> list[BlockView]:
        """One view per chosen layer and head that ``reading`` ran sparse, layers first."""
        selections = selections_by_layer(reading)
        return [
            BlockView(layer, head, selections[layer].to_mask()[0, head].cpu(), self._seen[layer, head].scores(self._config))
            for layer in self._layers
            for head in self._heads
            if layer in selections
        ]


@dataclass(frozen=True, eq=False)
class _Head:
    """``(length, dim)`` each."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float

    def scores(self, config: StemConfig) -> Tensor:
        """Row by row, as the reference does: a whole head at once would need its token-level score matrix."""
        value = config.beta * block_magnitude(self.v, config)
        rows = -(-len(self.q) // config.block_size)
        scores = torch.full((rows, rows), torch.nan)
        for row in range(rows):
            scores[row, : row + 1] = (block_scores(self.q, self.k, row, config, self.scale) + value[: row + 1]).cpu()
        return scores


def selections_by_layer(reading: Reading) -> dict[int, BlockSelection]:
    """The selection of every layer that ran sparse."""
    return {call.layer: call.selection for call in reading.calls if call.selection is not None}


def reach(reading: Reading) -> Tensor:
    """How far every head looks: median distance of a kept block from its row's diagonal, in blocks.

    Returns:
        fp64 ``(layers, heads)``; NaN in layers that ran dense.
    """
    selections = selections_by_layer(reading)
    heads = next(iter(selections.values())).counts.shape[1]
    distances = torch.full((max(call.layer for call in reading.calls) + 1, heads), torch.nan, dtype=torch.float64)
    for layer, selection in selections.items():
        distances[layer] = torch.tensor([_median_distance(kept) for kept in selection.to_mask()[0].cpu()])
    return distances


def _median_distance(kept: Tensor) -> float:
    rows, columns = kept.nonzero(as_tuple=True)
    return (rows - columns).double().median().item()


def row_counts(selection: BlockSelection) -> list[float]:
    """Blocks that each query block keeps, averaged over heads."""
    counts: list[float] = selection.counts.double().mean((0, 1)).tolist()
    return counts
