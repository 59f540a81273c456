"""Run a call as the host would: with "sdpa", or with the model's own eager function where "sdpa" has no answer."""

import sys
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stem_attention.errors import UnsupportedError
from stem_attention.integrations.transformers.mask import CausalMask, causal_entries
from stem_attention.integrations.transformers.model import is_eager_only

# Keyword arguments that change what the layer computes, and what they mean. "sdpa" has no answer to them.
_EAGER_ARGUMENTS = {
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "output_attentions": "attention weights asked for",
}
# Those that Stem computes too.
OURS = ("softcap", "s_aux")
_MIN_WINDOW_ROWS = 1024

_READ: MutableMapping[Tensor, tuple[int, list[int]]] = WeakTensorKeyDictionary()

Output = tuple[Tensor, Tensor | None]


class HostCall:
    """Describe what a layer passes to its attention function, ``(batch, heads, length, dim)``, and what it says of itself.

    ``mask`` is the layer's, or its entries where it no longer is what it says; ``causal`` is the mask if it says of what it is
    made. ``kv_len`` counts the keys that exist: a static cache hands over its whole buffer. ``layer`` is -1 when the module
    does not say. ``is_causal``: a query sees no later keys, as far as the mask does not say. ``borders``: where sequences begin
    that lie one after the other in the single row of a batch, and where the last one ends; None unless the host says so.
    ``window`` counts the keys that a query sees at most, where the mask says so.
    """

    def __init__(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, extra: dict[str, Any]
    ) -> None:
        self.module, self.query, self.key, self.value, self.extra = module, query, key, value, extra
        self.q_len = query.shape[2]
        if isinstance(mask, CausalMask) and (mask.changed or not 0 <= mask.first <= mask.shape[3] - self.q_len):
            mask = mask.entries()  # a host may have written to it, or cut keys away that queries see
        self.mask, self.causal = mask, mask if isinstance(mask, CausalMask) else None
        self.kv_len = key.shape[2] if self.causal is None else self.causal.seen
        self.window = None if self.causal is None else self.causal.window
        index, given = getattr(module, "layer_idx", None), extra.get("is_causal")
        self.layer = index if isinstance(index, int) else -1
        self.is_causal = bool(getattr(module, "is_causal", True) if given is None else given)
        self.borders = self._borders()

    def _borders(self) -> list[int] | None:
        starts = self.extra.get("cu_seq_lens_q")
        if not isinstance(starts, Tensor) or len(starts) < 3 or torch.compiler.is_compiling():  # compiled code cannot read it
            return None
        borders = _read(starts)
        whole = self.query.shape[0] == 1 and borders[-1] == self.q_len == self.kv_len
        return borders if whole else None


def _read(starts: Tensor) -> list[int]:
    """Return the numbers of a tensor, which waits for a GPU: once for all layers, unless someone writes to it."""
    if starts.is_inference():  # nobody counts what is written to it
        return list(starts.tolist())
    if starts not in _READ or _READ[starts][0] != starts._version:
        _READ[starts] = starts._version, starts.tolist()
    return _READ[starts][1]


def autocast(x: Tensor) -> Tensor:
    """Return a tensor as autocast hands it to products, where autocast is on."""
    kind = x.device.type
    on = kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(kind)) if on else x


def needs_eager(call: HostCall, known: tuple[str, ...] = ()) -> str | None:
    """Say why only the model's eager function can run a call, if so; not for the arguments that are ``known``."""
    for name, meaning in _EAGER_ARGUMENTS.items():
        value = call.extra.get(name)
        if value is not None and value is not False and name not in known:
            return meaning
    return "its class supports eager attention alone" if is_eager_only(getattr(call.module, "config", None)) else None


def host_attention(call: HostCall) -> Output:
    """Run a call densely; weights come from an eager function alone, and an error says where that is needed but missing."""
    mask, kv_len, extra = call.mask, call.kv_len, call.extra
    reason = needs_eager(call)
    if isinstance(mask, CausalMask):
        if call.window is not None and mask.is_large and not extra.get("output_attentions"):
            return _windowed(call, mask, call.window)
        if reason is None and mask.padding is None and mask.window is None and call.q_len == kv_len:
            mask, extra = None, {**extra, "is_causal": True}
        else:
            mask = (mask if torch.compiler.is_compiling() else mask.seen_part).entries()[..., :kv_len]
    elif mask is None and call.is_causal and call.q_len > 1 and (reason is not None or call.q_len < kv_len):
        # "sdpa" would align the queries to the first keys; eager functions know no causality of their own.
        mask = causal_entries(call.q_len, kv_len, kv_len - call.q_len, None, call.query.device)
    if kv_len < call.key.shape[2] and extra.get("position_bias") is not None:
        extra = {**extra, "position_bias": extra["position_bias"][..., :kv_len]}
    attend: Callable[..., Output] = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if reason is not None:
        attend = eager_function(call.module, reason)
        if mask is not None and mask.dtype == torch.bool:  # it is added to the scores
            zeros = torch.zeros(mask.shape, dtype=call.query.dtype, device=mask.device)
            mask = zeros.masked_fill(~mask, torch.finfo(call.query.dtype).min)
    return attend(call.module, call.query, call.key[:, :, :kv_len], call.value[:, :, :kv_len], mask, **extra)


def eager_function(module: torch.nn.Module, reason: str) -> Callable[..., Output]:
    """Find the eager attention function of a layer's model: transformers registers it under no name."""
    for cls in type(module).__mro__:
        eager: Callable[..., Output] | None = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if eager is not None:
            return eager
    raise UnsupportedError(
        f"{type(module).__name__} needs eager attention ({reason}), which its model does not offer; load the model with "
        'attn_implementation="eager"'
    )


def _windowed(call: HostCall, mask: CausalMask, window: int) -> Output:
    """Run a sliding window over pieces of the queries, each with just the keys that it can see."""
    outputs, size = [], max(window, _MIN_WINDOW_ROWS)
    for start in range(0, call.q_len, size):
        stop = min(start + size, call.q_len)
        rows, keys = slice(start, stop), slice(max(0, mask.first + start - window + 1), mask.first + stop)
        part = mask.part(rows, keys).entries()
        piece = HostCall(call.module, call.query[:, :, rows], call.key[:, :, keys], call.value[:, :, keys], part, call.extra)
        outputs.append(host_attention(piece)[0])
    return torch.cat(outputs, 1), None
