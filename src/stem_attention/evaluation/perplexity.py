"""How well a model predicts a long text when attention is sparse, against the same model dense, position by position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stem_attention.errors import UnsupportedError, bad_argument
from stem_attention.evaluation.measure import Case, Record, What
from stem_attention.evaluation.prefill import Reading, Watcher, read
from stem_attention.evaluation.texts import Text
from stem_attention.evaluation.windows import Windows

BUCKETS = 8
"""Equal stretches of positions whose scores are told apart."""

# Logits are made for this many positions at a time: those of a whole prompt would take gigabytes.
_POSITIONS = 256
_HEAD_TOLERANCE = 1e-2


@dataclass(frozen=True, eq=False)
class TextReading:
    """One prefill of a text.

    Attributes:
        hidden: ``(tokens, width)``, what the model's output head turns into next-token logits.
        reading: Times, and what Stem did in each layer.
    """

    hidden: Tensor
    reading: Reading


def read_text(model: PreTrainedModel, ids: list[int], what: What, *, on_attention: Watcher = lambda call: None) -> TextReading:
    """Prefill ``ids`` in one go and keep the final hidden states of every position.

    Args:
        model: Loaded by :func:`stem_attention.evaluation.models.load_model`.
        ids: The text.
        what: Stem's config or a policy to prefill with; None for the host's own dense attention.
        on_attention: Told about every attention call.

    Raises:
        UnsupportedError: The model's logits are not its output head's alone (they are scaled or capped afterwards).
    """
    outputs: list[Any] = []
    hook = model.base_model.register_forward_hook(lambda module, given, output: outputs.append(output))
    try:
        reading = read(model, ids, what, positions=1, on_attention=on_attention)
    finally:
        hook.remove()
    hidden: Tensor = outputs[0].last_hidden_state[0]
    _check_head(model, hidden, reading)
    return TextReading(hidden, reading)


@torch.inference_mode()
def _check_head(model: PreTrainedModel, hidden: Tensor, reading: Reading) -> None:
    own, plain = reading.logits[-1].double(), _logits(model, hidden[-1:])[0].cpu()
    if float((own - plain).abs().max()) > _HEAD_TOLERANCE * float(own.abs().max()):
        raise UnsupportedError(f"{type(model).__name__} changes its logits after the output head; its text cannot be scored")


def _logits(model: Any, hidden: Tensor) -> Tensor:
    logits: Tensor = model.get_output_embeddings()(hidden).double()
    return logits


@dataclass(frozen=True, eq=False)
class Scores:
    """How each token but the first was predicted; fp64 on the CPU, ``(tokens - 1,)`` each.

    Attributes:
        loss: Negative log-likelihood in nats.
        dense_loss: The same of the dense reading.
        kl: Kullback-Leibler divergence of the next-token distribution from the dense one, in nats.
        same: 1 where the likeliest next token is that of dense attention, else 0.
    """

    loss: Tensor
    dense_loss: Tensor
    kl: Tensor
    same: Tensor

    def means(self, rows: slice = slice(None)) -> Record:
        """Means over some positions, as plain types."""
        return {name: values[rows].mean().item() for name, values in vars(self).items()}


@torch.inference_mode()
def score_text(model: PreTrainedModel, ids: list[int], dense: TextReading, other: TextReading) -> Scores:
    """Score one reading of ``ids`` against the dense one; ``other`` may be ``dense`` itself."""
    targets, parts = torch.tensor(ids[1:], device=other.hidden.device), list[Tensor]()
    for start in range(0, len(targets), _POSITIONS):
        wanted = targets[start : start + _POSITIONS, None]
        rows = slice(start, start + len(wanted))
        p = _logits(model, dense.hidden[rows]).log_softmax(-1)
        q = p if other is dense else _logits(model, other.hidden[rows]).log_softmax(-1)
        kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
        same = (p.argmax(-1) == q.argmax(-1)).double()
        parts.append(torch.stack([-q.gather(1, wanted)[:, 0], -p.gather(1, wanted)[:, 0], kl, same]).cpu())
    return Scores(*torch.cat(parts, 1))


class Perplexity(Windows):
    """Windows of texts, predicted under each contender; see :class:`stem_attention.evaluation.measure.Measure`.

    Args:
        model: Loaded by :func:`stem_attention.evaluation.models.load_model`.
        tokenizer: Its tokenizer.
        texts: What to predict.
        lengths: Tokens of a window; all lengths are run.
        windows: Windows of each length and text, spread through the text without overlap.

    Raises:
        ValueError: A text is too short, two share a name, or there are fewer tokens than buckets.
    """

    name = "perplexity"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[Text],
        lengths: Sequence[int],
        windows: int,
    ) -> None:
        if min(lengths) <= BUCKETS:
            raise bad_argument("lengths", f"more than {BUCKETS} tokens", min(lengths), "ask for longer windows")
        super().__init__(model, tokenizer, texts, lengths, windows)
        self._dense: tuple[str, TextReading] | None = None

    def run(self, case: Case, what: What, watcher: Watcher) -> Record:
        ids = self.ids(case)
        dense = self._dense_reading(case, ids, watcher)
        reading = dense if what is None else read_text(self._model, ids, what, on_attention=watcher)
        scores, count = score_text(self._model, ids, dense, reading), len(ids) - 1
        ends = [round(count * bucket / BUCKETS) for bucket in range(BUCKETS + 1)]
        means = scores.means()
        return {
            "density": reading.reading.density,
            "seconds": reading.reading.seconds,
            "predicted": count,
            "perplexity": math.exp(means["loss"]),
            **means,
            "buckets": [{"first": low + 1, "last": high, **scores.means(slice(low, high))} for low, high in pairwise(ends)],
        }

    def _dense_reading(self, case: Case, ids: list[int], watcher: Watcher) -> TextReading:
        """The reading that the others of a case are compared with; a resumed run has to make it again."""
        if self._dense is None or self._dense[0] != case.key:
            self._dense = None  # two of them need not be held at once
            self._dense = case.key, read_text(self._model, ids, None, on_attention=watcher)
        return self._dense[1]
