"""Limits of Stem in SGLang: models that are refused at start-up, layers that stay with the dense backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.runtime_context import get_exec, get_parallel

from stem_attention.checks import DTYPES
from stem_attention.errors import UnsupportedError


def check_model(runner: Any) -> None:
    """Refuse what no layer of could take Stem, before a token is served.

    Args:
        runner: SGLang's ``ModelRunner``, its pools allocated.

    Raises:
        UnsupportedError: The model, its cache or the way it is run is out of reach; the message says why and the way out.
    """
    pool, graphs = runner.token_to_kv_pool, get_exec().graph.cuda_graph_config
    obstacles = {
        "multi-head latent attention keeps no keys per head": runner.use_mla_backend,
        f"its KV cache holds {runner.kv_cache_dtype}; start with --kv-cache-dtype auto": runner.kv_cache_dtype not in DTYPES,
        f"its KV cache holds {runner.kv_cache_dtype} and the model computes {runner.dtype}": runner.kv_cache_dtype
        != runner.dtype,
        f"its KV cache is a {type(pool).__name__}, not one pool of keys and values for all layers; for sliding-window hybrids "
        "start with --disable-hybrid-swa-memory": not isinstance(pool, MHATokenToKVPool),
        "its KV cache is not laid out token by token": getattr(pool, "kv_cache_layout", "nhd") != "nhd",
        "its KV cache is addressed by virtual slots": runner.kv_index_translator.is_translating,
        "prefill runs in CUDA graphs, which hold no lengths of new prompts; start with --disable-prefill-cuda-graph": graphs
        is not None
        and graphs.prefill.backend != "disabled",
        "context parallelism splits sequences over ranks": get_parallel().attn_cp_size > 1 or get_parallel().attn_dcp_size > 1,
    }
    for reason, applies in obstacles.items():
        if applies:
            raise UnsupportedError(
                f"--prefill-attention-backend stem cannot serve this model: {reason}. Leave the option out to serve it dense."
            )


def rank_heads(model: Any) -> slice:
    """Return the query heads of SGLang's ``ModelConfig`` that this rank of tensor parallelism has."""
    heads, rank = model.num_attention_heads // get_parallel().attn_tp_size, get_parallel().attn_tp_rank
    return slice(rank * heads, (rank + 1) * heads)


def layer_obstacle(layer: Any, dense_layers: int, context_len: int) -> str | None:
    """Tell why the dense backend must run a layer, or None.

    Args:
        layer: SGLang's ``RadixAttention``.
        dense_layers: First layers that the settings leave dense.
        context_len: Most tokens of a request: a window that none outgrows is none.
    """
    if layer.layer_id < dense_layers:
        return "dense_layers"
    if layer.is_cross_attention:
        return "cross-attention"
    if layer.attn_type.value != "decoder":
        return f"{layer.attn_type.value} attention"
    if -1 < layer.sliding_window_size < context_len - 1:  # earlier tokens that a token sees beside itself
        return "sliding window"
    if layer.use_irope:
        return "chunked local attention"
    if layer.logit_cap > 0:
        return "soft-capped scores"
    if layer.xai_temperature_len > 0:
        return "scores scaled by length"
    if layer.pos_encoding_mode != "NONE":
        return f"positions inside attention ({layer.pos_encoding_mode})"
    return "values of another head dimension" if layer.qk_head_dim != layer.v_head_dim else None


def unknown_arguments(extra: Mapping[str, object]) -> bool:
    """Tell whether a model passed something beside q, k and v that attention would have to heed."""
    return any(value is not None and value is not False for value in extra.values())
