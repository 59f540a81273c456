"""See what a policy keeps in one layer and head, next to where dense attention goes."""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from stem_attention.errors import UnsupportedError
from stem_attention.models.prefill import AttentionCall, Reading
from stem_attention.policies.oracle import block_mass
from stem_attention.selection import BlockSelection


@dataclass(frozen=True, eq=False)
class BlockView:
    """One query head of one layer; tensors are ``(rows, key_blocks)``."""

    layer: int
    head: int
    kept: Tensor  # bool
    attention: Tensor  # fp32: share of a query block's dense attention that goes to each key block; NaN after the diagonal

    @property
    def density(self) -> float:
        """Kept block pairs over causal ones. The view is of a whole prompt, so rows and columns start at the same block."""
        rows = len(self.kept)
        return int(self.kept.sum()) / (rows * (rows + 1) // 2)

    @property
    def kept_attention(self) -> float:
        """Share of dense attention that goes to kept blocks, averaged over query blocks."""
        return float(self.attention.where(self.kept, 0.0).sum(1).mean())

    @property
    def median_distance(self) -> float:
        """Median distance of a kept block from its row's diagonal, in blocks."""
        return _median_distance(self.kept)


class HeadRecorder:
    """Keeps q and k of chosen layers and heads while a model reads; pass it as ``on_attention``."""

    def __init__(self, layers: list[int], heads: list[int]) -> None:
        self._layers, self._heads = layers, heads
        self._seen: dict[tuple[int, int], tuple[Tensor, Tensor, float, float | None]] = {}

    def __call__(self, call: AttentionCall) -> None:
        """Copy the chosen heads, if the call is of a chosen layer. Attention is computed when the clock has stopped."""
        if call.layer in self._layers:
            group = call.q.shape[1] // call.k.shape[1]
            scale = call.q.shape[3] ** -0.5 if call.scale is None else call.scale
            for head in self._heads:
                self._seen[call.layer, head] = call.q[0, head].clone(), call.k[0, head // group].clone(), scale, call.softcap

    def views(self, reading: Reading) -> list[BlockView]:
        """Build one view per chosen layer and head that ``reading`` ran sparse, layers first; UnsupportedError without any."""
        selections, views = selections_by_layer(reading), []
        for layer, head in product([layer for layer in self._layers if layer in selections], self._heads):
            (q, k, scale, softcap), selection = self._seen[layer, head], selections[layer]
            shares = torch.full((selection.rows, selection.rows), torch.nan)
            for row in range(len(shares)):
                mass = block_mass(q[None, :, None], k[None, :, None], scale, selection.block_size, row, softcap)
                shares[row, : row + 1] = mass[0, 0].cpu()
            views.append(BlockView(layer, head, selection.to_mask()[0, head].cpu(), shares))
        if not views:
            told = f"nothing to show: the chosen layers ran dense ({reading.dense_reasons})"
            raise UnsupportedError(f"{told}; read a longer prompt or choose other layers")
        return views


def selections_by_layer(reading: Reading) -> dict[int, BlockSelection]:
    """Look up the selection of every layer that ran sparse."""
    return {call.layer: call.selection for call in reading.calls if call.selection is not None}


def reach(reading: Reading) -> Tensor:
    """Measure the median distance of a kept block from its row's diagonal: fp64 ``(layers, heads)``, NaN where dense."""
    selections = selections_by_layer(reading)
    heads = next(iter(selections.values())).counts.shape[1]
    distances = torch.full((max(call.layer for call in reading.calls) + 1, heads), torch.nan, dtype=torch.float64)
    for layer, selection in selections.items():
        distances[layer] = torch.tensor([_median_distance(kept) for kept in selection.to_mask()[0].cpu()])
    return distances


def _median_distance(kept: Tensor) -> float:
    rows, columns = kept.nonzero(as_tuple=True)
    return (rows - columns).double().median().item()
