"""Prefill a model dense or sparse, note what every layer did, and continue greedily."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stem_attention.errors import UnsupportedError
from stem_attention.models.load import Model
from stem_attention.policies import Policy

if TYPE_CHECKING:
    from stem_attention.integrations.transformers import LayerCall

SPARSE = "stem"


@dataclass(frozen=True)
class AttentionCall:
    """One call of a model's attention function; tensors are the host's, ``(batch, heads, length, dim)``."""

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None
    seconds: float
    sinks: Tensor | None = None
    softcap: float | None = None


Watcher = Callable[[AttentionCall], None]


@dataclass
class Reading:
    """One prefill of a prompt and the answer that followed."""

    logits: Tensor  # fp32 (positions, vocabulary): next-token logits of the prompt's last positions
    seconds: float  # to first token: the whole forward pass and the choice of the token
    attention_seconds: list[float]  # selection included, one entry per layer
    calls: "list[LayerCall]" = field(default_factory=list)  # what Stem did in each layer; empty for a dense prefill
    tokens: list[int] = field(default_factory=list)  # the greedy continuation, without the end-of-sequence token

    @property
    def density(self) -> float:
        """Kept share of the causal block pairs, averaged over layers; 1 for a layer that ran dense."""
        return sum(call.density for call in self.calls) / len(self.calls) if self.calls else 1.0

    @property
    def dense_reasons(self) -> str:
        """Reasons why layers ran dense, each once; empty where none did."""
        return ", ".join(sorted({call.reason for call in self.calls if not call.sparse}))


def default_attention(model: Model) -> str:
    """Name the attention that transformers itself would give this model: "sdpa", or "eager" where its class lacks that."""
    return str(model.get_correct_attn_implementation(None))


@contextmanager
def wrap_attention(name: str, around: Callable[..., Any]) -> Iterator[None]:
    """Call ``around`` with the real function, the layer and its arguments in place of transformers' function ``name``."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from stem_attention.integrations.transformers.dense import eager_function

    registered = ALL_ATTENTION_FUNCTIONS.get(name)

    def called(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return around(registered or eager_function(module, "it is timed"), module, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[name] = called
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS.pop(name)


@contextmanager
def watch(name: str, watcher: Watcher) -> Iterator[None]:
    """Report every call of the attention function ``name`` of transformers to ``watcher``; the call itself is unchanged."""

    def watched(inner: Callable[..., Any], module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        wait(q.device)
        start = time.perf_counter()
        result = inner(module, q, k, v, *args, **kwargs)
        wait(q.device)
        seconds = time.perf_counter() - start
        form = kwargs.get("s_aux"), kwargs.get("softcap")
        watcher(AttentionCall(getattr(module, "layer_idx", -1), q, k, v, kwargs.get("scaling"), seconds, *form))
        return result

    with wrap_attention(name, watched):
        yield


@contextmanager
def attending(model: Model, policy: Policy | None, **settings: Any) -> Iterator[str]:
    """Put a model on a policy for the ``with`` block, or with None on the host's own dense attention; yields its name.

    ``settings`` go to :class:`stem_attention.integrations.transformers.use_policy`. The model stays on that attention.
    """
    from stem_attention.integrations import transformers as stem_host

    name = default_attention(model) if policy is None else SPARSE
    model.set_attn_implementation(name)
    with nullcontext() if policy is None else stem_host.use_policy(policy, **settings):
        yield name


def wait(device: torch.device) -> None:
    """Wait for the work queued on a device, so that a clock read next is about finished work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@torch.inference_mode()
def read(
    model: Model,  # left with the attention that was used
    ids: list[int],
    policy: Policy | None,  # None for the host's own dense attention
    *,
    dense_below: int | None = None,  # prompts of fewer tokens run dense, with 0 none; None: as config or measurement say
    dense_layers: int | None = None,  # first layers that run dense; None: as the model's config says
    positions: int = 64,  # at the prompt's end, whose logits are kept
    max_new_tokens: int = 0,  # of the longest answer; decoding is dense either way
    on_attention: Watcher = lambda call: None,  # told about every attention call of the prefill
    on_token: Callable[[], None] = lambda: None,  # called after each new token
    is_done: Callable[[list[int]], bool] = lambda tokens: False,  # may the answer end, since later tokens do not matter?
) -> Reading:
    """Prefill ``ids`` in one go and answer greedily; UnsupportedError where the model lacks a token or gives NaN."""
    embeddings: Any = model.get_input_embeddings()
    if max(ids) >= (rows := len(embeddings.weight)):
        raise UnsupportedError(
            f"token {max(ids)} is none of the {rows} that {type(model).__name__} knows: the tokenizer is another model's; name "
            "a directory where both belong together"
        )
    prompt, calls, seconds = torch.tensor([ids], device=model.device), list[Any](), list[float]()

    def watcher(call: AttentionCall) -> None:
        seconds.append(call.seconds)
        on_attention(call)

    settings = {"dense_below": dense_below, "dense_layers": dense_layers, "observer": calls.append, "prompt_len": len(ids)}
    with attending(model, policy, **settings) as name, watch(name, watcher):
        wait(model.device)
        start = time.perf_counter()
        output = model(prompt, use_cache=True, logits_to_keep=min(positions, len(ids)))
        token = int(output.logits[0, -1].argmax())
        reading = Reading(output.logits[0].float().cpu(), time.perf_counter() - start, seconds, calls)
    if bool(reading.logits.isnan().any()):
        raise UnsupportedError(
            f"{type(model).__name__} gives NaN, {'dense' if policy is None else 'sparse'}: its weights hold NaN, or the dtype "
            "is too narrow for them; try float32, or fetch it again"
        )
    end = getattr(model.generation_config, "eos_token_id", None)
    cache = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"  # until transformers 5.23
    while len(reading.tokens) < max_new_tokens and token not in ([end] if isinstance(end, int) else end or []):
        reading.tokens.append(token)
        on_token()
        if len(reading.tokens) == max_new_tokens or is_done(reading.tokens):
            break
        output = model(torch.tensor([[token]], device=model.device), use_cache=True, **{cache: output[cache]})
        token = int(output.logits[0, -1].argmax())
    return reading


def agreement(dense: Reading, sparse: Reading) -> dict[str, float]:
    """Compare the next-token distributions of two readings over the prompt's last ``positions``, which are counted.

    ``top1`` is the share of them whose likeliest token is the same, ``kl`` the mean Kullback-Leibler divergence of the second
    reading from the first, in nats.
    """
    p, q = dense.logits.double().log_softmax(-1), sparse.logits.double().log_softmax(-1)
    top1 = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean().item()
    return {"positions": len(p), "top1": top1, "kl": kl}
