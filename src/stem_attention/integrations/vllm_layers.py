"""Which layers of a model Stem serves in vLLM, and what it refuses when the engine starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType
from vllm.v1.kv_cache_interface import FullAttentionSpec

from stem_attention.api import dense_limit, explain
from stem_attention.errors import UnsupportedError
from stem_attention.integrations.serving_settings import Settings, check_head_factors


@dataclass(frozen=True)
class LayerTraits:
    """What a layer asks of its attention, as vLLM tells the implementation when it builds it."""

    alibi: bool
    sliding_window: int | None
    soft_cap: float | None
    attn_type: str
    sinks: bool
    other: tuple[str, ...]

    @property
    def obstacle(self) -> str | None:
        """Why Stem cannot compute this layer, or None."""
        if self.attn_type != AttentionType.DECODER:
            return "not causal self-attention"
        if self.alibi:
            return "ALiBi"
        if self.sliding_window is not None:
            return "sliding window"
        if self.soft_cap:
            return "soft-capped scores"
        if self.sinks:
            return "attention sinks"
        return f"unknown options {', '.join(self.other)}" if self.other else None


def check_engine(config: VllmConfig) -> None:
    """Refuse what would change the meaning of a step's rows.

    Raises:
        UnsupportedError: The message names the option.
    """
    parallel = config.parallel_config
    for option, is_on in (
        ("decode context parallelism", parallel.decode_context_parallel_size > 1),
        ("prefill context parallelism", getattr(parallel, "prefill_context_parallel_size", 1) > 1),
        ("dual batch overlap (--enable-dbo)", parallel.use_ubatching),
        ("--kv-sharing-fast-prefill", config.cache_config.kv_sharing_fast_prefill),
    ):
        if is_on:
            raise UnsupportedError(f"Stem does not run with {option}; turn it off, or start without --attention-backend CUSTOM")


def layer_reasons(config: VllmConfig, settings: Settings) -> dict[str, str | None]:
    """For each attention layer of the model that Stem's backend was chosen for: why it stays dense, or None.

    Raises:
        UnsupportedError: They all stay dense: then Stem was asked for in vain.
    """
    layers = get_layers_from_vllm_config(config, Attention)
    reasons = {name: _reason(name, layer, config, settings) for name, layer in layers.items() if hasattr(layer.impl, "traits")}
    if all(reason is not None for reason in reasons.values()):
        raise UnsupportedError(
            f"Stem can run none of this model's {len(reasons)} attention layers: {_listed(reasons)}; "
            "start without --attention-backend CUSTOM, or change what stands in the way"
        )
    return reasons


def _reason(name: str, layer: Any, config: VllmConfig, settings: Settings) -> str | None:
    obstacle: str | None = layer.impl.traits.obstacle
    if obstacle is not None:
        return obstacle
    spec = layer.get_kv_cache_spec(config)
    if spec is None:  # the layer reads another one's cache
        return "shared KV cache"
    if type(spec) is not FullAttentionSpec or spec.sliding_window is not None or spec.attention_chunk_size is not None:
        return f"{type(spec).__name__} cache"
    if spec.non_causal:
        return "not causal self-attention"
    if spec.dtype != config.model_config.dtype:
        return f"KV cache of {spec.dtype} under {config.model_config.dtype}"
    if getattr(spec, "head_size_v", spec.head_size) != spec.head_size:
        return "value dimension differs from key dimension"
    if settings.config.dense_layers and extract_layer_index(name) < settings.config.dense_layers:
        return "dense_layers"
    return None


def layer_settings(name: str, impl: Any, config: VllmConfig, settings: Settings) -> Settings:
    """What one layer takes: of ``head_factors`` those of the query heads that this rank has of it.

    Raises:
        ValueError: ``head_factors`` are for another number of layers or heads.
    """
    if settings.config.head_factors is None:
        return settings
    heads, rank = impl.num_heads, get_tensor_model_parallel_rank()
    layers = config.model_config.get_total_num_hidden_layers()
    check_head_factors(settings.config, layers, heads * get_tensor_model_parallel_world_size())
    own = slice(rank * heads, (rank + 1) * heads)
    return replace(settings, config=settings.config.for_layer(extract_layer_index(name), own))


def checked_dense_limit(settings: Settings, device: torch.device, dtype: torch.dtype, head_dim: int) -> int:
    """Prompts of fewer tokens stay dense.

    Raises:
        UnsupportedError: No backend of Stem runs this dtype, head dimension and block size on this device.
    """
    config, backend = settings.config, settings.backend
    explanation = explain(device=device, dtype=dtype, head_dim=head_dim, config=config, backend=backend)
    if explanation.chosen is None:
        raise UnsupportedError(f"Stem cannot run this model.\n{explanation}")
    return dense_limit(device=device, dtype=dtype, head_dim=head_dim, config=config, backend=backend)


def start_line(reasons: dict[str, str | None], settings: Settings, limit: int, backend: str) -> str:
    """What the log says when the engine starts."""
    count = sum(reason is None for reason in reasons.values())
    dense = {name: reason for name, reason in reasons.items() if reason is not None}
    rest = f" (dense: {_listed(dense)})" if dense else ""
    return (
        f"Stem is on in {count} of {len(reasons)} attention layers{rest}: prompts of {limit} tokens and more are read "
        f"sparsely, in steps of {settings.min_query_len} tokens and more, by the {backend} backend; {settings}"
    )


def _listed(reasons: Mapping[str, str | None]) -> str:
    counts = Counter(reason for reason in reasons.values() if reason is not None)
    return ", ".join(f"{count} x {reason}" for reason, count in counts.items())
