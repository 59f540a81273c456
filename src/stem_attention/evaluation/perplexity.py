"""How well a model predicts a long text when attention is sparse, against the same model dense."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stem_attention.config import StemConfig
from stem_attention.errors import UnsupportedError, bad_argument
from stem_attention.evaluation.prefill import Reading, Watcher, read
from stem_attention.policies import Policy

STDLIB_MODULES = ("argparse", "difflib", "inspect", "optparse", "pdb", "tarfile", "turtle", "typing")
"""Long modules that have stayed single files since Python 3.10."""

# Logits are made for this many positions at a time: those of a whole prompt would take gigabytes.
_POSITIONS = 256
_HEAD_TOLERANCE = 1e-2


def stdlib_text() -> str:
    """Python source that every machine has: some long modules of the running interpreter's standard library, joined."""
    return "\n".join(_module_file(name).read_text(encoding="utf-8") for name in STDLIB_MODULES)


def _module_file(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise UnsupportedError(f"this Python has no source file of its module {name}; give a text of your own")
    return Path(spec.origin)


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int) -> list[int]:
    """The first ``tokens`` tokens of a text.

    Raises:
        ValueError: The text is shorter, or fewer than 2 tokens are asked for.
    """
    if tokens < 2:
        raise bad_argument("tokens", "an integer >= 2", tokens, "the first token predicts nothing before it")
    ids = list(tokenizer(text).input_ids)
    if len(ids) < tokens:
        raise bad_argument("text", f"at least {tokens} tokens", f"{len(ids)}", "give a longer text or ask for fewer tokens")
    return ids[:tokens]


@dataclass(frozen=True, eq=False)
class TextReading:
    """One prefill of a text.

    Attributes:
        hidden: ``(tokens, width)``, what the model's output head turns into next-token logits.
        reading: Times, and what Stem did in each layer.
    """

    hidden: Tensor
    reading: Reading


def read_text(
    model: PreTrainedModel,
    ids: list[int],
    what: StemConfig | Policy | None,
    *,
    on_attention: Watcher = lambda call: None,
) -> TextReading:
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


@dataclass(frozen=True)
class TextScore:
    """How a text was predicted.

    Attributes:
        tokens: Tokens predicted: all but the first.
        perplexity: Exponential of their mean negative log-likelihood.
        perplexity_last_half: The same over the last half of them.
        kl: Mean Kullback-Leibler divergence of the next-token distribution from the dense one, in nats.
        top1: Share of positions whose likeliest next token is that of dense attention.
    """

    tokens: int
    perplexity: float
    perplexity_last_half: float
    kl: float
    top1: float


@torch.inference_mode()
def score_text(model: PreTrainedModel, ids: list[int], dense: TextReading, other: TextReading) -> TextScore:
    """Score one reading of ``ids`` against the dense one; ``other`` may be ``dense`` itself."""
    targets, losses, divergences, agreeing = torch.tensor(ids[1:], device=other.hidden.device), [], [], []
    for start in range(0, len(targets), _POSITIONS):
        wanted = targets[start : start + _POSITIONS, None]
        rows = slice(start, start + len(wanted))
        p, q = (_logits(model, reading.hidden[rows]).log_softmax(-1) for reading in (dense, other))
        losses.append(-q.gather(1, wanted)[:, 0])
        divergences.append(torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1))
        agreeing.append(p.argmax(-1) == q.argmax(-1))
    loss = torch.cat(losses)
    return TextScore(
        tokens=len(loss),
        perplexity=math.exp(loss.mean().item()),
        perplexity_last_half=math.exp(loss[len(loss) // 2 :].mean().item()),
        kl=torch.cat(divergences).mean().item(),
        top1=torch.cat(agreeing).double().mean().item(),
    )
