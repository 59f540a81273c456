"""Limits of Stem in SGLang: models that are refused at start-up, layers that stay with the dense backend."""

from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.runtime_context import get_exec, get_parallel

from stem_attention.checks import DTYPES
from stem_attention.errors import UnsupportedError
from stem_attention.integrations.serving.rows import first_reason

FP8_CACHES = (torch.float8_e4m3fn,)


def check_model(runner: Any) -> None:
    """Refuse a ``ModelRunner``, its pools allocated, of which no layer could take Stem, before a token is served.

    Raises:
        UnsupportedError: The model, its cache or the way it is run is out of reach; the message says why and the way out.
    """
    pool, dtype, parallel = runner.token_to_kv_pool, runner.kv_cache_dtype, get_parallel()
    graphs = get_exec().graph.cuda_graph_config
    in_graphs = graphs is not None and graphs.prefill.backend != "disabled"
    obstacles = {
        "multi-head latent attention keeps no keys per head": runner.use_mla_backend,
        f"its KV cache holds {dtype}; start with --kv-cache-dtype auto or fp8_e4m3": dtype not in (*DTYPES, *FP8_CACHES),
        f"its KV cache holds {dtype} and the model computes {runner.dtype}": dtype not in (runner.dtype, *FP8_CACHES),
        f"its KV cache is a {type(pool).__name__}, not one pool of keys and values for all layers; for sliding-window hybrids "
        "start with --disable-hybrid-swa-memory": not isinstance(pool, MHATokenToKVPool),
        "its KV cache is not laid out token by token": getattr(pool, "kv_cache_layout", "nhd") != "nhd",
        "its KV cache is addressed by virtual slots": runner.kv_index_translator.is_translating,
        "prefill runs in CUDA graphs, which hold no lengths of new prompts; start with --disable-prefill-cuda-graph": in_graphs,
        "context parallelism splits sequences over ranks": max(parallel.attn_cp_size, parallel.attn_dcp_size) > 1,
    }
    if (reason := first_reason(obstacles)) is not None:
        raise UnsupportedError(
            f"--prefill-attention-backend stem cannot serve this model: {reason}. Leave the option out to serve it dense."
        )


def rank_heads(model: Any) -> slice:
    """Return the query heads of SGLang's ``ModelConfig`` that this rank of tensor parallelism has."""
    heads, rank = model.num_attention_heads // get_parallel().attn_tp_size, get_parallel().attn_tp_rank
    return slice(rank * heads, (rank + 1) * heads)


def layer_obstacle(layer: Any, dense_layers: int, context_len: int) -> str | None:
    """Tell why the dense backend must run a ``RadixAttention``, or None. A window that no request outgrows is none."""
    obstacles = {
        "dense_layers": layer.layer_id < dense_layers,
        "cross-attention": layer.is_cross_attention,
        f"{layer.attn_type.value} attention": layer.attn_type.value != "decoder",
        # SGLang counts the earlier tokens that a token sees beside itself.
        "sliding window": -1 < layer.sliding_window_size < context_len - 1,
        "chunked local attention": layer.use_irope,
        f"scores bounded by {layer.logit_capping_method}": layer.logit_cap > 0 and layer.logit_capping_method != "tanh",
        "scores scaled by length": layer.xai_temperature_len > 0,
        f"positions inside attention ({layer.pos_encoding_mode})": layer.pos_encoding_mode != "NONE",
    }
    return first_reason(obstacles)
