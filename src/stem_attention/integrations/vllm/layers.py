"""The layers of a model that Stem serves in vLLM, and what it refuses when the engine starts."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import vllm
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from stem_attention.backends import Explanation
from stem_attention.errors import UnsupportedError
from stem_attention.integrations.serving.rows import first_reason
from stem_attention.integrations.serving.settings import Settings, read_settings
from stem_attention.integrations.vllm.plugin import NAME
from stem_attention.policies import Policy


def engine_settings(config: VllmConfig) -> Settings:
    """Read the settings of an engine, and refuse what would change the meaning of a step's rows, or hides them.

    Raises:
        UnsupportedError: The message names the option, or what this vLLM lacks.
        ValueError: The settings are bad; the message names the place and the field.
    """
    known = {field.name for field in fields(CommonAttentionMetadata)}
    missing = [name for name in ("is_prefilling", "seq_lens_cpu_upper_bound", "mm_req_doc_ranges") if name not in known]
    if missing:
        what = f"its attention metadata has no {' and no '.join(missing)}"
        raise UnsupportedError(f"Stem does not know this vLLM ({vllm.__version__}): {what}; it knows 0.26 to 0.32")
    parallel = config.parallel_config
    options = {
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "dual batch overlap (--enable-dbo)": parallel.use_ubatching,
        "--kv-sharing-fast-prefill": config.cache_config.kv_sharing_fast_prefill,
        "a window over answers alone (R-SWA)": getattr(config.model_config, "rswa_window", None) is not None,
    }
    if (option := first_reason(options)) is not None:
        raise UnsupportedError(f"Stem does not run with {option}; turn it off, or start without --attention-backend {NAME}")
    return read_settings(config.additional_config)


def layer_reasons(config: VllmConfig, settings: Settings) -> dict[str, str | None]:
    """Tell for each attention layer of the model that Stem's backend was chosen for why it stays dense, or None.

    Raises:
        UnsupportedError: They all stay dense: then Stem was asked for in vain.
    """
    layers = get_layers_from_vllm_config(config, Attention)
    ours = {name: layer for name, layer in layers.items() if hasattr(layer.impl, "stem_obstacle")}
    reasons = {name: _reason(name, layer, config, settings) for name, layer in ours.items()}
    if all(reason is not None for reason in reasons.values()):
        raise UnsupportedError(
            f"Stem can run none of this model's {len(reasons)} attention layers: {_listed(reasons)}; "
            f"start without --attention-backend {NAME}, or change what stands in the way"
        )
    return reasons


def _reason(name: str, layer: Any, config: VllmConfig, settings: Settings) -> str | None:
    model, obstacle = config.model_config, layer.impl.stem_obstacle
    if layer.sliding_window is not None and layer.sliding_window < model.max_model_len:  # one that no request outgrows is none
        return "sliding window"
    if obstacle is not None:
        return str(obstacle)
    spec = layer.get_kv_cache_spec(config)
    if spec is None:  # the layer reads another one's cache
        return "shared KV cache"
    if type(spec) not in (FullAttentionSpec, SlidingWindowSpec) or getattr(spec, "attention_chunk_size", None) is not None:
        return f"{type(spec).__name__} cache"
    same_precision = spec.dtype == model.dtype or layer.impl.reads_fp8(layer)
    reasons = {
        "sliding window": (spec.sliding_window or model.max_model_len) < model.max_model_len,
        "not causal self-attention": getattr(spec, "non_causal", False),
        f"KV cache of {layer.kv_cache_dtype} under {model.dtype}": not same_precision,
        "value dimension differs from key dimension": getattr(spec, "head_size_v", spec.head_size) != spec.head_size,
        "dense_layers": settings.dense_layers > 0 and extract_layer_index(name) < settings.dense_layers,
    }
    return first_reason(reasons)


def layer_policy(name: str, impl: Any, config: VllmConfig, policy: Policy) -> Policy:
    """Return what one layer runs: of a policy with numbers for each head, those of the query heads that this rank has of it.

    Raises:
        ValueError: The policy is for a model with other layers or heads.
    """
    heads, rank = impl.num_heads, get_tensor_model_parallel_rank()
    policy.check_model(config.model_config.get_total_num_hidden_layers(), heads * get_tensor_model_parallel_world_size())
    return policy.for_layer(extract_layer_index(name), slice(rank * heads, (rank + 1) * heads))


def start_line(reasons: dict[str, str | None], settings: Settings, chosen: Explanation, lengths_known: bool) -> str:
    """Write what the log says when the engine starts."""
    count = sum(reason is None for reason in reasons.values())
    rest = f" (dense: {_listed(reasons)})" if count < len(reasons) else ""
    unknown = "" if lengths_known else "this vLLM's runner does not tell prompt lengths: a chunk counts as its prompt's end; "
    return (
        f"Stem is on in {count} of {len(reasons)} attention layers{rest}: prompts of {chosen.dense_below} tokens and more are "
        f"read sparsely, in steps of {settings.min_query_len} tokens and more, by the {chosen.chosen} backend; "
        f"{unknown}{settings}"
    )


def _listed(reasons: Mapping[str, str | None]) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in Counter(filter(None, reasons.values())).items())
