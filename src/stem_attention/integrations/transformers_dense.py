"""One attention call of a transformers model, and how the host itself would run it densely."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stem_attention.errors import UnsupportedError
from stem_attention.integrations.transformers_mask import WindowMask, causal_mask

# Keyword arguments that change what the layer computes, and what they mean. "sdpa" has no answer to them.
_EAGER_ONLY = {
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "output_attentions": "attention weights asked for",
}
_MIN_WINDOW_ROWS = 1024

Output = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class HostCall:
    """What a layer passes to its attention function; ``query``, ``key`` and ``value`` are ``(batch, heads, length, dim)``."""

    module: torch.nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | WindowMask | None
    dropout: float
    scaling: float | None
    sliding_window: int | None
    extra: dict[str, Any]

    @property
    def q_len(self) -> int:
        return self.query.shape[2]

    @property
    def padding(self) -> Tensor | None:
        """The mask if it is bool ``(batch, kv_len)``, True where a key is a token."""
        return self.mask if isinstance(self.mask, Tensor) and self.mask.dim() == 2 else None

    @property
    def kv_len(self) -> int:
        """Keys that exist; a static cache hands over its whole buffer."""
        return int(self.key.shape[2] if self.padding is None else self.padding.shape[1])

    @property
    def layer(self) -> int:
        """Index of the layer in its model, -1 when the module does not say."""
        index = getattr(self.module, "layer_idx", None)
        return index if isinstance(index, int) else -1

    @property
    def is_causal(self) -> bool:
        given = self.extra.get("is_causal")
        return bool(getattr(self.module, "is_causal", True) if given is None else given)

    @property
    def eager_only(self) -> str | None:
        """What the host can do in its eager attention alone, if this call needs it."""
        for name, meaning in _EAGER_ONLY.items():
            value = self.extra.get(name)
            if value is not None and value is not False:
                return meaning
        return None


class ErrorsNaming:
    """Add the layer and the shapes of a call to what is raised inside; its type stays, so that hosts can catch it."""

    def __init__(self, call: HostCall) -> None:
        self.call = call

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, Exception):
            call = self.call
            shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in (("query", call.query), ("key", call.key)))
            error.args = (f"{error} [in layer {call.layer}, {type(call.module).__name__}: {shapes}, {call.query.dtype}]",)


def host_attention(call: HostCall) -> Output:
    """Run a call with the host's own dense attention: "sdpa", or the model's eager function where "sdpa" cannot.

    Raises:
        UnsupportedError: Only an eager function could run it, and the model has none.
    """
    if isinstance(call.mask, WindowMask):
        return _windowed(call, call.mask)
    kv_len, extra = call.kv_len, call.extra
    if kv_len < call.key.shape[2] and extra.get("position_bias") is not None:
        extra = {**extra, "position_bias": extra["position_bias"][..., :kv_len]}
    mask = _dense_mask(call, call.mask)
    return _host_function(call)(
        call.module,
        call.query,
        call.key[:, :, :kv_len],
        call.value[:, :, :kv_len],
        _eager_mask(call, mask) if call.eager_only else mask,
        dropout=call.dropout,
        scaling=call.scaling,
        sliding_window=call.sliding_window,
        **extra,
    )


def _dense_mask(call: HostCall, mask: Tensor | None) -> Tensor | None:
    """The 4D mask of a call, or None where "sdpa" needs none."""
    if call.padding is not None:
        whole = call.q_len == call.kv_len and bool(call.padding.all())
        return None if whole else causal_mask(call.padding, call.q_len, call.kv_len, call.padding.device)
    if mask is None and call.is_causal and 1 < call.q_len < call.kv_len:
        return causal_mask(None, call.q_len, call.kv_len, call.query.device)
    return mask


def _host_function(call: HostCall) -> Callable[..., Output]:
    needs = call.eager_only
    if needs is None:
        sdpa: Callable[..., Output] = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa
    for cls in type(call.module).__mro__:
        eager: Callable[..., Output] | None = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if eager is not None:
            return eager
    raise UnsupportedError(
        f"{type(call.module).__name__} has {needs}, which Stem and sdpa cannot run, and its model offers no eager attention; "
        'load the model with attn_implementation="eager"'
    )


def _eager_mask(call: HostCall, mask: Tensor | None) -> Tensor | None:
    """Eager functions add the mask to the scores and know no causality of their own."""
    if mask is None and call.is_causal and call.q_len > 1:
        mask = causal_mask(None, call.q_len, call.kv_len, call.query.device)
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=call.query.dtype, device=mask.device).masked_fill(
        ~mask, torch.finfo(call.query.dtype).min
    )


def _windowed(call: HostCall, mask: WindowMask) -> Output:
    """Run a sliding window over pieces of the queries, each with just the keys that it can see."""
    size, outputs = max(mask.window, _MIN_WINDOW_ROWS), []
    if call.extra.get("output_attentions"):
        size = call.q_len  # the weights are as large as the whole mask anyway
    for start in range(0, call.q_len, size):
        rows = range(start, min(start + size, call.q_len))
        shift = mask.q_offset - mask.kv_offset
        columns = range(max(0, shift + rows.start - mask.window + 1), shift + rows.stop)
        piece = replace(
            call,
            query=call.query[:, :, rows.start : rows.stop],
            key=call.key[:, :, columns.start : columns.stop],
            value=call.value[:, :, columns.start : columns.stop],
            mask=mask.piece(call.query.shape[0], rows, columns, call.query.device),
        )
        outputs.append(host_attention(piece))
    return outputs[0] if len(outputs) == 1 else (torch.cat([out for out, _ in outputs], 1), None)
