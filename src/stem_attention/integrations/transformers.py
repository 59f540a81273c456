"""Run models of Hugging Face transformers with Stem.

    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="stem")

Prefill is sparse, also continued and chunked prefill over a cache and left-padded batches, whose rows are computed as if
they came alone. Everything else goes to the host's own dense attention: decode, short queries and prompts, the config's
dense layers, sliding windows, non-causal layers, soft caps, sinks, biases, packed sequences, masks with holes, dropout.

A graph of ``torch.compile`` cannot read masks: in it a prefill is sparse over a dynamic cache and without an
``attention_mask``. With a mask, a static cache or ``use_cache=False`` (where the host looks for packed sequences) it is dense.
"""

from __future__ import annotations

from itertools import groupby
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from stem_attention.api import block_sparse_attention, dense_limit, select_blocks, stem_attention
from stem_attention.config import StemConfig
from stem_attention.errors import UnsupportedError
from stem_attention.integrations.transformers_dense import ErrorsNaming, HostCall, Output, host_attention
from stem_attention.integrations.transformers_mask import WindowMask, stem_mask, token_spans
from stem_attention.integrations.transformers_settings import (
    NAME,
    LayerCall,
    Overrides,
    configure,
    model_config,
    overrides,
    set_config,
)
from stem_attention.policies import Policy
from stem_attention.selection import BlockSelection

__all__ = ["MIN_QUERY_LEN", "LayerCall", "configure", "register", "set_config"]

MIN_QUERY_LEN = 32
"""Fewest query tokens of a sparse call: shorter ones, such as the verification of drafted tokens, belong to decoding."""

Spans = list[tuple[int, int]]


def register() -> None:
    """Make ``attn_implementation="stem"`` known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, stem_mask)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | WindowMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> Output:
    """transformers' attention hook for "stem"; it names and passes the arguments.

    Args:
        module: The attention layer.
        query: ``(batch, q_heads, q_len, dim)``, rotated.
        key: ``(batch, kv_heads, length, dim)``, the cache included.
        value: As ``key``.
        attention_mask: What :func:`stem_mask` returned, or the caller's own 4D mask.
        dropout: Probability; 0 outside training.
        scaling: Softmax scale.
        sliding_window: The layer's window, if it has one.
        **kwargs: What else the model passes.

    Returns:
        ``(batch, q_len, q_heads, dim)``, zero in rows that are padding on the sparse path; and the weights, where the model's
        eager attention ran, else None.

    Raises:
        UnsupportedError: A gradient is needed on the sparse path, or the layer needs what neither side offers.
        Exception: What a policy or the sparse path raises, its message with the layer and the shapes.
    """
    call = HostCall(module, query, key, value, attention_mask, dropout, scaling, sliding_window, kwargs)
    given = overrides()
    policy = model_config(getattr(module, "config", None)) if given.policy is None else given.policy
    if isinstance(policy, StemConfig):
        policy = policy.for_layer(call.layer)
    reason = _layer_obstacle(call) or _length_obstacle(call, policy, given.prompt_len)
    if reason is not None:
        return _dense(call, reason, given)
    spans: Spans | None = [(0, call.kv_len)] * query.shape[0]
    if call.padding is not None:
        spans = token_spans(call.padding)
    if spans is None:
        return _dense(call, "padding inside the text", given)
    if torch.compiler.is_compiling():
        return _sparse(call, policy, spans, given), None
    with ErrorsNaming(call):
        return _sparse(call, policy, spans, given), None


def _layer_obstacle(call: HostCall) -> str | None:
    """Why this layer's attention is not what Stem computes, if it is not."""
    for name in ("indices", "block_indices"):
        if call.extra.get(name) is not None:
            raise UnsupportedError(
                f"{type(call.module).__name__} selects keys itself; load it with another attn_implementation"
            )
    if call.sliding_window is not None or isinstance(call.mask, WindowMask):
        return "sliding window"
    if not call.is_causal:
        return "not causal"
    if call.eager_only is not None:
        return call.eager_only
    if call.extra.get("position_bias") is not None:
        return "position bias"
    if call.value.shape[3] != call.key.shape[3]:
        return "value dimension differs from key dimension"
    return None


def _length_obstacle(call: HostCall, policy: StemConfig | Policy, prompt_len: int | None) -> str | None:
    """Why this call of a layer that Stem could run is left dense, if it is."""
    if call.q_len == 1:
        return "decode"
    if call.q_len < MIN_QUERY_LEN:
        return "short query"
    if call.kv_len < call.q_len:
        return "fewer keys than queries"
    if call.mask is not None and call.padding is None:
        return "custom mask"
    if isinstance(policy, StemConfig):
        if 0 <= call.layer < policy.dense_layers:
            return "dense layer"
        if (call.kv_len if prompt_len is None else prompt_len) < _dense_limit(call.query, policy):
            return "short prompt"
    if call.dropout > 0 and not (torch.is_grad_enabled() and call.query.requires_grad):
        return "dropout"
    return None


def _dense(call: HostCall, reason: str, given: Overrides) -> Output:
    if given.observer is None:
        return host_attention(call)
    start = perf_counter()
    output = host_attention(call)
    seconds = perf_counter() - start
    given.observer(LayerCall(call.layer, call.q_len, call.kv_len, False, reason, None, seconds))
    return output


def _sparse(call: HostCall, policy: StemConfig | Policy, spans: Spans, given: Overrides) -> Tensor:
    """Run every row of the batch on its own tokens, neighbours with equal padding together."""
    q, k, v = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
    first, kv_len = call.kv_len - call.q_len, call.kv_len
    if all(span == (0, kv_len) for span in spans):
        return _observed(call, q, k[:, :kv_len], v[:, :kv_len], policy, given, given.prompt_len)
    out = torch.zeros_like(q)
    for (start, end), group in groupby(range(len(spans)), key=spans.__getitem__):
        if end <= first:
            continue
        members = list(group)
        rows, keys = slice(members[0], members[-1] + 1), slice(start, end)
        queries = slice(max(start, first) - first, end - first)
        prompt_len = None
        if given.prompt_len is not None:  # a row whose padding has begun is at its end
            prompt_len = (given.prompt_len if end == kv_len else end) - start
        out[rows, queries] = _observed(call, q[rows, queries], k[rows, keys], v[rows, keys], policy, given, prompt_len)
    return out


def _observed(
    call: HostCall, q: Tensor, k: Tensor, v: Tensor, policy: StemConfig | Policy, given: Overrides, prompt_len: int | None
) -> Tensor:
    """Select and attend; apart if someone wants to see the selection."""
    if isinstance(policy, StemConfig) and given.observer is None:
        return stem_attention(q, k, v, config=policy, scale=call.scaling, prompt_len=prompt_len)
    start = 0.0 if given.observer is None else perf_counter()
    out, selection = _apart(call, q, k, v, policy, prompt_len)
    if given.observer is not None:
        seconds, reason = perf_counter() - start, "short prompt" if selection is None else "prefill"
        given.observer(LayerCall(call.layer, q.shape[1], k.shape[1], selection is not None, reason, selection, seconds))
    return out


def _apart(
    call: HostCall, q: Tensor, k: Tensor, v: Tensor, policy: StemConfig | Policy, prompt_len: int | None
) -> tuple[Tensor, BlockSelection | None]:
    if not isinstance(policy, StemConfig):
        selection = policy(q, k, v, scale=call.scaling, prompt_len=prompt_len)
    elif (k.shape[1] if prompt_len is None else prompt_len) < _dense_limit(q, policy):  # a short row of a padded batch
        return stem_attention(q, k, v, config=policy, scale=call.scaling, prompt_len=prompt_len), None
    else:
        selection = select_blocks(q, k, v, config=policy, scale=call.scaling, prompt_len=prompt_len)
    return block_sparse_attention(q, k, v, selection, scale=call.scaling), selection


def _dense_limit(q: Tensor, config: StemConfig) -> int:
    return dense_limit(device=q.device, dtype=q.dtype, head_dim=q.shape[3], config=config)
