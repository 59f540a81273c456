"""What of a prefill is attention and what is the feed-forward part, and what attention was computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stem_attention.evaluation.bench_ttft_models import prefill


@dataclass(frozen=True)
class Parts:
    """Seconds of one prefill with its parts timed.

    Attributes:
        total: The whole.
        attention: All layers' attention without the projections: what a different attention can change.
        mlp: All layers' feed-forward parts.
    """

    total: float
    attention: float
    mlp: float


@dataclass(frozen=True)
class Layer:
    """One call of attention: ``(batch, heads, length, dim)`` inputs, ``(batch, length, heads, dim)`` output."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor


@dataclass(frozen=True)
class Observed:
    """A prefill's logits, its parts, and the attention of one layer."""

    logits: Tensor
    parts: Parts
    layer: Layer


class _Stopwatch:
    """Adds up spans of the device's time, or on a CPU of the host's, without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._spans: list[tuple[Any, Any]] = []
        self._start: Any = None

    def _now(self) -> Any:
        if not self._cuda:
            return perf_counter()
        kind: Any = torch.cuda.Event  # which torch has no types for
        event = kind(enable_timing=True)
        event.record()
        return event

    def start(self, *_: object) -> None:
        self._start = self._now()

    def stop(self, *_: object) -> None:
        self._spans.append((self._start, self._now()))

    def seconds(self) -> float:
        if not self._cuda:
            return float(sum(end - start for start, end in self._spans))
        torch.cuda.synchronize(self._device)
        return float(sum(start.elapsed_time(end) for start, end in self._spans)) / 1e3


@contextmanager
def _around_attention(implementation: str, run: Callable[[Callable[[], Any], tuple[Any, ...]], Any]) -> Iterator[None]:
    """Inside, ``run(call, (module, query, key, value))`` stands around every call of an attention implementation."""
    original = ALL_ATTENTION_FUNCTIONS[implementation]

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        return run(lambda: original(module, query, key, value, *args, **kwargs), (module, query, key, value))

    AttentionInterface.register(implementation, attend)
    try:
        yield
    finally:
        AttentionInterface.register(implementation, original)


def observe(model: PreTrainedModel, tokens: Tensor, layer: int) -> Observed:
    """One prefill with the attention function and the layers' ``mlp`` modules timed, and one layer's attention kept."""
    whole, attention, mlp = (_Stopwatch(tokens.device) for _ in range(3))
    kept: list[Layer] = []

    def timed(call: Callable[[], Any], inputs: tuple[Any, ...]) -> Any:
        attention.start()
        result = call()
        attention.stop()
        module, query, key, value = inputs
        if module.layer_idx == layer:
            kept.append(Layer(query, key, value, result[0]))
        return result

    with ExitStack() as stack:
        stack.enter_context(_around_attention(str(model.config._attn_implementation), timed))
        for name, module in model.named_modules():
            if name.endswith(".mlp"):
                stack.callback(module.register_forward_pre_hook(mlp.start).remove)
                stack.callback(module.register_forward_hook(mlp.stop).remove)
        whole.start()
        logits = prefill(model, tokens)
        whole.stop()
    return Observed(logits, Parts(whole.seconds(), attention.seconds(), mlp.seconds()), kept[0])
