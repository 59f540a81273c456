"""Errors of sparse attention: layer by layer on the dense model's own activations, and what they come to at the end."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from stem_attention import BlockSelection, block_sparse_attention, select_blocks, stem_attention
from stem_attention.models.prefill import AttentionCall
from stem_attention.policies import Dense, Policy
from stem_attention.policies.oracle import block_mass
from stem_evals.measure import Case, Record, of_prefill
from stem_evals.perplexity import logits_of, read_text
from stem_evals.windows import Windows

QUARTERS = 4
LAST = 64
"""Positions at the end of a text that stand for where a question is answered."""

# Logits are made for this many positions at a time: those of a whole prompt would take gigabytes.
_POSITIONS = 256
_DIGITS = 6


class LayerProbe:
    """Tries a contender on every attention call of a dense prefill; pass it as ``on_attention``.

    It works on each layer's q, k and v while they are there and keeps a few numbers per head, in lists by layer:

    Attributes:
        recall: Share of the dense attention mass that lies in kept blocks, averaged over all queries.
        recall_last: The same over the queries of the last block alone.
        error: Norm of the difference between sparse and dense output, relative to the dense output's, over all queries.
    """

    def __init__(self, policy: Policy | None) -> None:
        self._policy = Dense() if policy is None else policy
        self.recall: list[list[float]] = []
        self.recall_last: list[list[float]] = []
        self.error: list[list[float]] = []

    def __call__(self, call: AttentionCall) -> None:
        """Measure one layer. Layers must come in order."""
        q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
        scale = q.shape[3] ** -0.5 if call.scale is None else call.scale
        scores = {"scale": scale, "softcap": call.softcap}
        selection = select_blocks(q, k, v, policy=self._policy.for_layer(call.layer), **scores)
        recall, grid = mass_recall(q, k, scale, selection, call.softcap), selection.grid
        rows = torch.tensor([high - low for low, high in map(grid.row_positions, range(grid.first_row, grid.end_row))])
        mean = (recall * rows.to(recall.device)).sum(-1) / rows.sum()
        sparse = block_sparse_attention(q, k, v, selection, sinks=call.sinks, **scores)
        dense = stem_attention(q, k, v, dense_below=q.shape[1] + k.shape[1], sinks=call.sinks, **scores)
        error = relative_error(sparse[0].transpose(0, 1).flatten(1), dense[0].transpose(0, 1).flatten(1))
        for values, kept in ((mean, self.recall), (recall[:, -1], self.recall_last), (error, self.error)):
            kept.append([round(value, _DIGITS) for value in values.tolist()])


def mass_recall(q: Tensor, k: Tensor, scale: float, selection: BlockSelection, softcap: float | None = None) -> Tensor:
    """Share of each query block's dense attention mass that lies in its kept blocks.

    Args:
        q: ``(1, q_len, q_heads, dim)``.
        k: ``(1, kv_len, kv_heads, dim)``.
        scale: Softmax scale.
        selection: Made for these shapes.
        softcap: Bound of the scaled scores, or None.

    Returns:
        ``(q_heads, rows)``, each between 0 and 1.
    """
    kept = selection.to_mask()[0]
    masses = []
    for row in range(selection.rows):
        mass = block_mass(q, k, scale, selection.block_size, selection.first_row + row, softcap)[0]
        masses.append((mass * kept[:, row, : mass.shape[1]]).sum(-1))
    return torch.stack(masses, 1).clamp(max=1)


def relative_error(got: Tensor, expected: Tensor) -> Tensor:
    """Norm of the difference over the norm of ``expected``, along the last dimension; fp32."""
    difference: Tensor = torch.linalg.vector_norm(got.float() - expected.float(), dim=-1)
    norm: Tensor = torch.linalg.vector_norm(expected, dim=-1, dtype=torch.float32)
    return difference / norm.clamp(min=torch.finfo(torch.float32).tiny)


class Layers(Windows):
    """Windows of texts, each layer and the whole model compared; see :class:`stem_evals.measure.Measure`.

    One dense prefill gives every layer's exact inputs, on which the contender is tried (:class:`LayerProbe`); one sparse
    prefill shows what the errors of all layers come to. Hidden states are the final ones, which the output head reads.
    """

    name = "layers"
    looks_into_layers = True

    def run(self, case: Case, policy: Policy | None) -> Record:
        """The record holds, beside the probe's lists, relative errors of hidden states and logits by quarter of the text.

        For dense itself they show what rounding alone makes: recall 1, and output errors of the kernel.
        """
        ids, probe = self.ids(case), LayerProbe(policy)
        dense = read_text(self._model, ids, None, probe)
        sparse = dense if policy is None else read_text(self._model, ids, policy)
        squares = self._squares(sparse.hidden, dense.hidden)
        ends = [round(len(ids) * quarter / QUARTERS) for quarter in range(QUARTERS + 1)]
        quarters = [_ratios(squares[low:high]) for low, high in pairwise(ends)]
        return {
            **of_prefill(sparse.reading),
            "recall": probe.recall,
            "recall_last": probe.recall_last,
            "output_error": probe.error,
            "hidden_error": [hidden for hidden, _ in quarters],
            "logit_error": [logits for _, logits in quarters],
            "logit_error_last": _ratios(squares[-LAST:])[1],
        }

    @torch.inference_mode()
    def _squares(self, sparse: Tensor, dense: Tensor) -> Tensor:
        """fp64 ``(tokens, 4)``: squared norms of the difference and of dense, of hidden states and of logits."""
        parts = []
        for pair in zip(torch.split(sparse, _POSITIONS), torch.split(dense, _POSITIONS), strict=True):
            both = [
                (got.float() - want.float(), want.float()) for got, want in (pair, [logits_of(self._model, x) for x in pair])
            ]
            parts.append(torch.stack([x.square().sum(-1) for one in both for x in one], -1).double())
        return torch.cat(parts)


def _ratios(squares: Tensor) -> tuple[float, float]:
    """Relative errors of hidden states and logits over some positions together."""
    hidden, hidden_norm, logits, logits_norm = squares.sum(0).sqrt().tolist()
    return round(hidden / hidden_norm, _DIGITS), round(logits / logits_norm, _DIGITS)
