"""The attention function of "stem": sparse where a policy can choose, dense as the host would be everywhere else."""

from itertools import groupby, pairwise
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from stem_attention import gradients
from stem_attention.api import block_sparse_attention, select_blocks, stem_attention, stem_attention_varlen
from stem_attention.backends import Request, get_backend
from stem_attention.errors import UnsupportedError
from stem_attention.integrations.transformers.dense import OURS, HostCall, Output, autocast, host_attention, needs_eager
from stem_attention.integrations.transformers.mask import CausalMask
from stem_attention.integrations.transformers.settings import LayerCall, Now, check_fit, goes_backward, settings_now
from stem_attention.policies import Policy

MIN_QUERY_LEN = 32
"""Fewest query tokens of a sparse call: shorter ones, such as the verification of drafted tokens, belong to decoding."""

WINDOW = "sliding window"
"""The reason that is given for a layer whose window hides keys, whoever computes it."""

# Tokens of a block under a window: of narrow ones less lies in blocks that the window cuts (gpt-oss 128, Gemma 3 1024; H100).
_NARROW, _NARROW_BLOCK, _WIDE_BLOCK = 1024, 64, 128

# What layers that may be computed again ran with last.
_LAST: WeakKeyDictionary[torch.nn.Module, tuple[Policy, int | None, int]] = WeakKeyDictionary()


def attention_forward(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Output:
    """Run one layer. transformers calls this; it names and passes the arguments.

    ``query`` is ``(batch, q_heads, q_len, dim)``, rotated, ``key`` and ``value`` are ``(batch, kv_heads, length, dim)``, the
    cache included. The mask is :func:`stem_mask`'s or the caller's own in 4D; ``kwargs`` are what else the model passes.

    Returns:
        ``(batch, q_len, q_heads, value_dim)``, zero in rows that are padding on the sparse path; and the weights, where the
        model's eager attention ran, else None.

    Raises:
        UnsupportedError: Dropout is asked for where a gradient is, or the layer needs what neither side offers.
        Exception: What a policy or the sparse path raises, its message with the layer and the shapes.
    """
    # Autocast leaves rotated queries and keys in fp32 beside values that it has cast; "sdpa" would have it cast all three.
    query, key, value = (autocast(x) for x in (query, key, value))
    call = HostCall(module, query, key, value, attention_mask, kwargs)
    now = settings_now(getattr(module, "config", None))
    reason = _obstacle(call, now)
    _check_recomputed(module, now)
    if torch.compiler.is_compiling():  # whether the prompt is too short is then for the operator to see
        return host_attention(call) if reason else (_sparse(call, now, now.dense_below), None)
    if reason is None:
        try:
            limit = now.dense_below
            if limit is None:
                limit = get_backend(Request.of(query, value, now.policy.block_size)).dense_limit(None)
            longest = call.kv_len if call.borders is None else max(high - low for low, high in pairwise(call.borders))
            if (longest if now.prompt_len is None else now.prompt_len) >= limit:
                return _sparse(call, now, limit), None
        except Exception as error:  # its type stays, so that hosts can catch it
            shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, {query.dtype}"
            error.args = (f"{error} [in layer {call.layer}, {type(module).__name__}: {shapes}]",)
            raise
        reason = WINDOW if call.window is not None else "short prompt"
    if now.observer is None:
        return host_attention(call)
    start = perf_counter()
    output = host_attention(call)
    now.observer(LayerCall(call.layer, call.q_len, call.kv_len, False, reason, None, perf_counter() - start))
    return output


def _obstacle(call: HostCall, now: Now) -> str | None:
    """Say why a call is dense whatever its length, if it is: first what lies in the layer, then what lies in the call."""
    extra, causal, window = call.extra, call.causal, call.extra.get("sliding_window")
    if extra.get("indices") is not None or extra.get("block_indices") is not None:
        raise UnsupportedError(f"{type(call.module).__name__} selects keys itself; load it with another attn_implementation")
    if causal is None and window is not None and call.kv_len > window:
        return WINDOW
    if call.window is not None and call.borders is not None:
        return WINDOW
    if (reason := needs_eager(call, OURS)) is not None:
        return reason
    if not call.is_causal and causal is None:
        return "not causal"
    if extra.get("position_bias") is not None:
        return "position bias"
    if call.q_len < MIN_QUERY_LEN:
        return "decode" if call.q_len == 1 else "short query"
    if call.kv_len < call.q_len:
        return "fewer keys than queries"
    if call.mask is not None and causal is None and call.borders is None:
        return "custom mask"
    if causal is not None and causal.padding is not None:
        if torch.compiler.is_compiling():
            return "padding, which a compiled graph cannot read"
        if causal.spans is None:
            return "padding inside the text"
    if 0 <= call.layer < now.dense_layers:
        return "dense layer"
    needed = gradients.needed(call.query, call.key, call.value)
    if not needed and extra.get("dropout", 0.0) > 0:
        return "dropout"
    # In training the same for passes without a gradient: reentrant checkpointing computes a layer twice.
    if call.window is not None and (needed or call.module.training):
        return "no gradient of windows"
    return None


def _check_recomputed(module: torch.nn.Module, now: Now) -> None:
    """Refuse to compute a checkpointed layer again under other settings than those of its forward pass.

    A block of ``use_policy`` may have been left by then, or not reach the thread in which torch does it on a GPU. Or another
    pass ran meanwhile, under settings of its own: whose layer it is that torch computes again, nobody says.
    """
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return
    settings = now.policy, now.dense_below, now.dense_layers
    if not goes_backward():
        _LAST[module] = settings
    elif _LAST.get(module, settings) != settings:
        said = "torch would compute a checkpointed layer again under other settings than those that it last ran with"
        ways = "store the policy in the model with set_policy; run passes of another policy in torch.inference_mode()"
        raise UnsupportedError(f"{said}; {ways}")


def _sparse(call: HostCall, now: Now, limit: int | None) -> Tensor:
    """Run every row of the batch on its own tokens, neighbours with equal padding together."""
    if call.extra.get("dropout", 0.0) > 0:  # while it trains: without a gradient such a layer runs dense
        raise UnsupportedError("dropout: sparse attention has none; train with attention_dropout=0 in the model's config")
    check_fit(now.policy, getattr(call.module, "config", None))  # a block of use_policy does not know the model
    policy, kv_len = now.policy.for_layer(call.layer), call.kv_len
    q, k, v = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
    if call.borders is not None:
        return _packed(call, now, policy, (q[0], k[0], v[0]), call.borders, limit)
    spans = None if call.causal is None or call.causal.padding is None else call.causal.spans
    if spans is None:
        return _attend(call, now, policy, (q, k[:, :kv_len], v[:, :kv_len]), now.prompt_len, limit)
    out, first = q.new_zeros((*q.shape[:3], v.shape[3])), kv_len - call.q_len
    for (start, end), group in groupby(range(len(spans)), key=spans.__getitem__):
        if end <= first:
            continue
        members = list(group)
        rows, keys = slice(members[0], members[-1] + 1), slice(start, end)
        queries = slice(max(start, first) - first, end - first)
        # A row whose padding has begun is at its end.
        prompt_len = None if now.prompt_len is None else (now.prompt_len if end == kv_len else end) - start
        out[rows, queries] = _attend(call, now, policy, (q[rows, queries], k[rows, keys], v[rows, keys]), prompt_len, limit)
    return out


def _packed(
    call: HostCall, now: Now, policy: Policy, qkv: tuple[Tensor, Tensor, Tensor], borders: list[int], limit: int | None
) -> Tensor:
    """Run sequences that lie one after the other; apart if someone wants to see the selections."""
    if now.observer is not None:
        parts = ([x[None, low:high] for x in qkv] for low, high in pairwise(borders))
        return torch.cat([_attend(call, now, policy, (q, k, v), None, limit) for q, k, v in parts], 1)
    starts, longest = torch.tensor(borders, dtype=torch.int32), max(high - low for low, high in pairwise(borders))
    options: dict[str, Any] = {"policy": policy, "dense_below": limit, **_scores(call)}
    out: Tensor = stem_attention_varlen(*qkv, starts, starts, longest, longest, **options)
    return out[None]


def _attend(
    call: HostCall, now: Now, policy: Policy, qkv: tuple[Tensor, Tensor, Tensor], prompt_len: int | None, limit: int | None
) -> Tensor:
    """Select and attend, below ``limit`` tokens densely; apart if someone wants to see the selection."""
    (q, k, v), scores = qkv, _scores(call)
    q_len, kv_len = q.shape[1], k.shape[1]
    if call.causal is not None and call.window is not None:
        return _windowed(call, now, qkv, call.causal, call.window)
    choice: dict[str, Any] = {"policy": policy, "prompt_len": prompt_len}
    if now.observer is None:
        whole: Tensor = stem_attention(q, k, v, dense_below=limit, **choice, **scores)
        return whole
    start, selection, reason = perf_counter(), None, "short prompt"
    if limit is not None and (kv_len if prompt_len is None else prompt_len) < limit:  # a short row of a padded batch
        out: Tensor = stem_attention(q, k, v, dense_below=limit, **choice, **scores)
    else:
        estimates = {name: value for name, value in scores.items() if name != "sinks"}
        selection, reason = select_blocks(q, k, v, **choice, **estimates), "prefill"
        out = block_sparse_attention(q, k, v, selection, **scores)
    seconds = perf_counter() - start
    now.observer(LayerCall(call.layer, q_len, kv_len, selection is not None, reason, selection, seconds))
    return out


def _windowed(call: HostCall, now: Now, qkv: tuple[Tensor, Tensor, Tensor], mask: CausalMask, window: int) -> Tensor:
    """Attend to every key of a sliding window, and to the blocks that hold none not at all."""
    (q, k, v), start = qkv, perf_counter()
    (batch, q_len, heads, _), kv_len = q.shape, k.shape[1]
    size = _NARROW_BLOCK if window < _NARROW else _WIDE_BLOCK
    shape: dict[str, Any] = {"block_size": size, "q_len": q_len, "kv_len": kv_len, "batch": batch, "q_heads": heads}
    blocks = mask.window_blocks(window, **shape, device=q.device)
    out: Tensor = block_sparse_attention(q, k, v, blocks, window=window, **_scores(call))
    if now.observer is not None:
        now.observer(LayerCall(call.layer, q_len, kv_len, False, WINDOW, None, perf_counter() - start))
    return out


def _scores(call: HostCall) -> dict[str, Any]:
    """Collect what the model does to scores, by our arguments' names."""
    sinks, extra = call.extra.get("s_aux"), call.extra
    if isinstance(sinks, Tensor) and sinks.dtype != call.query.dtype:
        sinks = sinks.float()
    return {"scale": extra.get("scaling"), "softcap": extra.get("softcap"), "sinks": sinks}
