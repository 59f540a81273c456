"""How well a model predicts a long text when attention is sparse, against the same model dense, position by position."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stem_attention.errors import UnsupportedError
from stem_attention.models.prefill import Reading, Watcher, read
from stem_attention.policies import Policy
from stem_evals.measure import Case, Record, of_prefill
from stem_evals.windows import Windows

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


@torch.inference_mode()
def read_text(
    model: PreTrainedModel, ids: list[int], policy: Policy | None, on_attention: Watcher = lambda call: None
) -> TextReading:
    """Prefill ``ids`` in one go, sparse whatever the length, and keep the final hidden states of every position.

    Raises:
        UnsupportedError: The model's logits are not its output head's alone (they are scaled or capped afterwards).
    """
    outputs: list[Any] = []
    hook = model.base_model.register_forward_hook(lambda module, given, output: outputs.append(output))
    try:
        reading = read(model, ids, policy, dense_below=0, positions=1, on_attention=on_attention)
    finally:
        hook.remove()
    hidden = outputs[0].last_hidden_state[0]
    own, plain = reading.logits[-1].double(), logits_of(model, hidden[-1:])[0].cpu()
    if float((own - plain).abs().max()) > _HEAD_TOLERANCE * float(own.abs().max()):
        raise UnsupportedError(f"{type(model).__name__} changes its logits after the output head; its text cannot be scored")
    return TextReading(hidden, reading)


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """fp64 logits of final hidden states."""
    logits: Tensor = model.get_output_embeddings()(hidden).double()
    return logits


@torch.inference_mode()
def score_text(model: PreTrainedModel, ids: list[int], dense: TextReading, other: TextReading) -> dict[str, Tensor]:
    """Score how a reading of ``ids``, which may be ``dense`` itself, predicts each token but the first.

    Returns:
        fp64 on the CPU, ``(tokens - 1,)`` each: ``loss``, negative log-likelihood in nats, and ``dense_loss``; ``kl``,
        divergence of the next-token distribution from the dense one, in nats; ``same``, 1 where the likeliest is dense's.
    """
    targets, parts = torch.tensor(ids[1:], device=other.hidden.device), list[Tensor]()
    for wanted, before, after in zip(
        *(torch.split(x, _POSITIONS) for x in (targets, dense.hidden[:-1], other.hidden[:-1])), strict=True
    ):
        p = logits_of(model, before).log_softmax(-1)
        q = p if other is dense else logits_of(model, after).log_softmax(-1)
        kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
        loss, dense_loss = (-x.gather(1, wanted[:, None])[:, 0] for x in (q, p))
        parts.append(torch.stack([loss, dense_loss, kl, (p.argmax(-1) == q.argmax(-1)).double()]).cpu())
    return dict(zip(("loss", "dense_loss", "kl", "same"), torch.cat(parts, 1), strict=True))


class Perplexity(Windows):
    """Windows of texts, predicted under each contender; see :class:`stem_evals.measure.Measure`."""

    name = "perplexity"
    _dense: tuple[str, TextReading] | None = None

    def run(self, case: Case, policy: Policy | None) -> Record:
        """The record holds means of :func:`score_text` over the window and over each of its stretches."""
        ids = self.ids(case)
        if self._dense is None or self._dense[0] != case.key:  # a resumed run has to make it again
            self._dense = None  # two of them need not be held at once
            self._dense = case.key, read_text(self._model, ids, None)
        dense = self._dense[1]
        reading = dense if policy is None else read_text(self._model, ids, policy)
        scores, count = score_text(self._model, ids, dense, reading), len(ids) - 1

        def means(low: int, high: int) -> dict[str, float]:
            return {name: values[low:high].mean().item() for name, values in scores.items()}

        whole, ends = means(0, count), [round(count * bucket / BUCKETS) for bucket in range(BUCKETS + 1)]
        return {
            **of_prefill(reading.reading),
            "predicted": count,
            "perplexity": math.exp(whole["loss"]),
            **whole,
            "buckets": [{"first": low + 1, "last": high, **means(low, high)} for low, high in pairwise(ends)],
        }
