"""Prefill a model dense or sparse, note what every layer did, and continue greedily."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stem_attention.config import StemConfig
from stem_attention.integrations import transformers as stem_host
from stem_attention.policies import Policy

DENSE, SPARSE = "sdpa", "stem"


@dataclass(frozen=True)
class AttentionCall:
    """One call of a model's attention function; tensors are the host's, ``(batch, heads, length, dim)``."""

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None
    seconds: float


Watcher = Callable[[AttentionCall], None]


@dataclass
class Reading:
    """One prefill of a prompt and the answer that followed.

    Attributes:
        logits: fp32 ``(positions, vocabulary)``: next-token logits of the prompt's last positions.
        seconds: Time to first token: the whole forward pass and the choice of the token.
        attention_seconds: Seconds in attention (selection included), one entry per layer.
        calls: What Stem did in each layer; empty for a dense prefill.
        tokens: The greedy continuation, without the end-of-sequence token.
    """

    logits: Tensor
    seconds: float
    attention_seconds: list[float]
    calls: list[stem_host.LayerCall] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    @property
    def density(self) -> float:
        """Kept share of the causal block pairs, averaged over layers; 1 for a layer that ran dense."""
        return sum(call.density for call in self.calls) / len(self.calls) if self.calls else 1.0


@contextmanager
def watch(name: str, watcher: Watcher) -> Iterator[None]:
    """Report every call of the attention function ``name`` of transformers to ``watcher``; the call itself is unchanged."""
    inner = ALL_ATTENTION_FUNCTIONS[name]

    def watched(module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        wait(q.device)
        start = time.perf_counter()
        result = inner(module, q, k, v, *args, **kwargs)
        wait(q.device)
        seconds = time.perf_counter() - start
        watcher(AttentionCall(getattr(module, "layer_idx", -1), q, k, v, kwargs.get("scaling"), seconds))
        return result

    ALL_ATTENTION_FUNCTIONS[name] = watched
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS.pop(name)


def wait(device: torch.device) -> None:
    """Wait for the work queued on a device, so that a clock read next is about finished work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@torch.inference_mode()
def read(
    model: PreTrainedModel,
    ids: list[int],
    what: StemConfig | Policy | None,
    *,
    positions: int = 64,
    max_new_tokens: int = 0,
    on_attention: Watcher = lambda call: None,
    on_token: Callable[[], None] = lambda: None,
    is_done: Callable[[list[int]], bool] = lambda tokens: False,
) -> Reading:
    """Prefill ``ids`` in one go and answer greedily.

    Args:
        model: Loaded by :func:`stem_attention.evaluation.models.load_model`; left with the attention that was used.
        ids: The prompt.
        what: Stem's config or a policy to prefill with; None for the host's own dense attention.
        positions: Positions at the prompt's end whose logits are kept.
        max_new_tokens: Longest answer; decoding is dense either way.
        on_attention: Told about every attention call of the prefill.
        on_token: Called after each new token.
        is_done: Whether an answer may end after these tokens, since later ones do not matter.
    """
    name, calls, seconds = (DENSE if what is None else SPARSE), list[stem_host.LayerCall](), list[float]()

    def watcher(call: AttentionCall) -> None:
        seconds.append(call.seconds)
        on_attention(call)

    model.set_attn_implementation(name)
    configured: AbstractContextManager[Any] = nullcontext()
    if what is not None:
        configured = stem_host.configure(what, observer=calls.append, prompt_len=len(ids))
    prompt = torch.tensor([ids], device=model.device)
    with configured, watch(name, watcher):
        wait(model.device)
        start = time.perf_counter()
        output = model(prompt, use_cache=True, logits_to_keep=min(positions, len(ids)))
        first = int(output.logits[0, -1].argmax())
        reading = Reading(output.logits[0].float().cpu(), time.perf_counter() - start, seconds, calls)
    if max_new_tokens:
        reading.tokens = _continue(model, first, output.past_key_values, max_new_tokens, on_token, is_done)
    return reading


def _continue(
    model: PreTrainedModel,
    token: int,
    cache: Any,
    limit: int,
    on_token: Callable[[], None],
    is_done: Callable[[list[int]], bool],
) -> list[int]:
    """Greedy tokens from ``token`` on, up to ``limit`` of them, the end of the sequence or an answer that is done."""
    ends, tokens = _end_tokens(model), list[int]()
    while token not in ends:
        tokens.append(token)
        on_token()
        if len(tokens) == limit or is_done(tokens):
            break
        output = model(torch.tensor([[token]], device=model.device), past_key_values=cache, use_cache=True)
        token = int(output.logits[0, -1].argmax())
    return tokens


def _end_tokens(model: PreTrainedModel) -> set[int]:
    ends = getattr(model.generation_config, "eos_token_id", None)
    return {ends} if isinstance(ends, int) else set(ends or ())


@dataclass(frozen=True)
class Agreement:
    """How near the next-token distributions of two readings are, over the prompt's last ``positions``.

    Attributes:
        positions: Positions compared.
        top1: Share of them whose likeliest token is the same.
        kl: Mean Kullback-Leibler divergence of the second from the first, in nats.
    """

    positions: int
    top1: float
    kl: float


def agreement(dense: Reading, sparse: Reading) -> Agreement:
    """Compare two readings of the same prompt."""
    p, q = dense.logits.double().log_softmax(-1), sparse.logits.double().log_softmax(-1)
    top1 = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean().item()
    return Agreement(len(p), top1, kl)
