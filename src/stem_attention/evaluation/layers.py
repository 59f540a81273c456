"""Where sparse attention goes wrong: layer by layer on the dense model's own activations, and what comes out at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stem_attention.api import block_sparse_attention, select_blocks
from stem_attention.backends.dense import dense_attention
from stem_attention.config import StemConfig
from stem_attention.errors import UnsupportedError
from stem_attention.evaluation.measure import Case, Record, What
from stem_attention.evaluation.perplexity import read_text
from stem_attention.evaluation.prefill import AttentionCall, Watcher
from stem_attention.evaluation.texts import Text
from stem_attention.evaluation.windows import Windows
from stem_attention.policies import Dense
from stem_attention.policies.oracle import block_mass
from stem_attention.selection import BlockSelection

QUARTERS = 4
LAST = 64
"""Positions at the end of a text that stand for where a question is answered."""

# Logits are made for this many positions at a time: those of a whole prompt would take gigabytes.
_POSITIONS = 256
_DIGITS = 6


def check_full_attention(model: PreTrainedModel, measure: str) -> None:
    """Check that every layer attends to all earlier tokens.

    Raises:
        UnsupportedError: Some do not; the message names the measure.
    """
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if kinds - {"full_attention"}:
        raise UnsupportedError(f"{measure} compares full causal attention; {type(model).__name__} has {', '.join(kinds)}")


class LayerProbe:
    """Tries a contender on every attention call of a dense prefill; pass it as ``on_attention``.

    It works on each layer's q, k and v while they are there and keeps a few numbers per head, in lists by layer:

    Attributes:
        recall: Share of the dense attention mass that lies in kept blocks, averaged over all queries.
        recall_last: The same over the queries of the last block alone.
        error: Norm of the difference between sparse and dense output, relative to the dense output's, over all queries.
    """

    def __init__(self, what: What) -> None:
        self._what = what
        self.recall: list[list[float]] = []
        self.recall_last: list[list[float]] = []
        self.error: list[list[float]] = []

    def __call__(self, call: AttentionCall) -> None:
        """Measure one layer. Layers must come in order."""
        q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
        scale = q.shape[3] ** -0.5 if call.scale is None else call.scale
        selection = self._select(call.layer, q, k, v, scale)
        recall = mass_recall(q, k, scale, selection)
        rows = torch.tensor([_row_length(selection, row) for row in range(selection.rows)], device=recall.device)
        sparse, dense = block_sparse_attention(q, k, v, selection, scale=scale), dense_attention(q, k, v, scale)
        error = relative_error(sparse[0].transpose(0, 1).flatten(1), dense[0].transpose(0, 1).flatten(1))
        mean = (recall * rows).sum(-1) / rows.sum()
        for values, kept in ((mean, self.recall), (recall[:, -1], self.recall_last), (error, self.error)):
            kept.append([round(value, _DIGITS) for value in values.tolist()])

    def _select(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> BlockSelection:
        what = self._what
        if what is None or (isinstance(what, StemConfig) and layer < what.dense_layers):
            return Dense()(q, k, v)
        if isinstance(what, StemConfig):
            return select_blocks(q, k, v, config=what.for_layer(layer), scale=scale)
        return what(q, k, v, scale=scale)


def mass_recall(q: Tensor, k: Tensor, scale: float, selection: BlockSelection) -> Tensor:
    """Share of each query block's dense attention mass that lies in its kept blocks.

    Args:
        q: ``(1, q_len, q_heads, dim)``.
        k: ``(1, kv_len, kv_heads, dim)``.
        scale: Softmax scale.
        selection: Made for these shapes.

    Returns:
        ``(q_heads, rows)``, each between 0 and 1.
    """
    kept = selection.to_mask()[0]
    masses = []
    for row in range(selection.rows):
        mass = block_mass(q, k, scale, selection.block_size, selection.first_row + row)[0]
        masses.append((mass * kept[:, row, : mass.shape[1]]).sum(-1))
    return torch.stack(masses, 1).clamp(max=1)


def _row_length(selection: BlockSelection, row: int) -> int:
    """Queries in a row of a selection."""
    first = (selection.first_row + row) * selection.block_size
    return min(first + selection.block_size, selection.kv_len) - max(first, selection.kv_len - selection.q_len)


def relative_error(got: Tensor, expected: Tensor) -> Tensor:
    """Norm of the difference over the norm of ``expected``, along the last dimension; fp32."""
    difference: Tensor = torch.linalg.vector_norm(got.float() - expected.float(), dim=-1)
    norm: Tensor = torch.linalg.vector_norm(expected, dim=-1, dtype=torch.float32)
    return difference / norm.clamp(min=torch.finfo(torch.float32).tiny)


class Layers(Windows):
    """Windows of texts, each layer and the whole model compared; see :class:`stem_attention.evaluation.measure.Measure`.

    One dense prefill gives every layer's exact inputs, on which the contender is tried (:class:`LayerProbe`); one sparse
    prefill shows what the errors of all layers come to. Hidden states are the final ones, which the output head reads.

    Args:
        model: Loaded by :func:`stem_attention.evaluation.models.load_model`.
        tokenizer: Its tokenizer.
        texts: What to read, no two of the same name.
        lengths: Tokens of a window; all lengths are run.
        windows: Windows of each length and text, spread through the text without overlap.

    Raises:
        ValueError: A text is too short, or two share a name.
        UnsupportedError: Some layers of the model attend to something else than all earlier tokens.
    """

    name = "layers"
    prefills = 2

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[Text],
        lengths: Sequence[int],
        windows: int,
    ) -> None:
        check_full_attention(model, self.name)
        super().__init__(model, tokenizer, texts, lengths, windows)

    def run(self, case: Case, what: What, watcher: Watcher) -> Record:
        """The record holds, beside the probe's lists, relative errors of hidden states and logits by quarter of the text.

        For dense itself they show what rounding alone makes: recall 1, and output errors of the kernel.
        """
        ids = self.ids(case)
        probe = LayerProbe(what)

        def probing(call: AttentionCall) -> None:
            probe(call)
            watcher(call)

        dense = read_text(self._model, ids, None, on_attention=probing)
        sparse = dense if what is None else read_text(self._model, ids, what, on_attention=watcher)
        return {
            "density": sparse.reading.density,
            "seconds": sparse.reading.seconds,
            "recall": probe.recall,
            "recall_last": probe.recall_last,
            "output_error": probe.error,
            **self._final_errors(sparse.hidden, dense.hidden),
        }

    @torch.inference_mode()
    def _final_errors(self, sparse: Tensor, dense: Tensor) -> Record:
        ends = [round(len(dense) * quarter / QUARTERS) for quarter in range(QUARTERS + 1)]
        quarters = [slice(low, high) for low, high in pairwise(ends)]
        last = slice(max(0, len(dense) - LAST), len(dense))
        return {
            "hidden_error": [_ratio([(sparse[rows], dense[rows])]) for rows in quarters],
            "logit_error": [_ratio(self._logits(sparse, dense, rows)) for rows in quarters],
            "logit_error_last": _ratio(self._logits(sparse, dense, last)),
        }

    def _logits(self, sparse: Tensor, dense: Tensor, rows: slice) -> Iterator[tuple[Tensor, Tensor]]:
        model: Any = self._model  # its class has no types for its head
        head = model.get_output_embeddings()
        for start in range(rows.start, rows.stop, _POSITIONS):
            part = slice(start, min(start + _POSITIONS, rows.stop))
            yield head(sparse[part]), head(dense[part])


def _ratio(pairs: Iterator[tuple[Tensor, Tensor]] | Sequence[tuple[Tensor, Tensor]]) -> float:
    """Relative error over all the pairs together."""
    sums = [torch.stack([(got.float() - want.float()).square().sum(), want.float().square().sum()]) for got, want in pairs]
    difference, norm = torch.stack(sums).double().sum(0).sqrt().tolist()
    return round(difference / norm, _DIGITS) if norm else 0.0
