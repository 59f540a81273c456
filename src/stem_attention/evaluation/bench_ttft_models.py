"""Models as people run them, with random weights: the time of a prefill does not depend on what they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


@dataclass(frozen=True)
class Architecture:
    """The numbers of a model's config.

    Attributes:
        model_type: What transformers calls the family.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Dimension of a head.
        layers: Decoder layers.
        sizes: The rest, as transformers names it.
    """

    model_type: str
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    sizes: dict[str, Any] = field(default_factory=dict)


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip


def _plain_rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


ARCHITECTURES = {
    "llama-3.1-8b": Architecture("llama", 32, 8, 128, 32, {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072, "rope_parameters": _llama3_rope(8.0), "tie_word_embeddings": False,
    }),
    "qwen3-8b": Architecture("qwen3", 32, 8, 128, 36, {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 40960, "rope_parameters": _plain_rope(1e6), "tie_word_embeddings": False,
    }),
    "qwen2.5-7b": Architecture("qwen2", 28, 4, 128, 28, {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072, "rope_parameters": _plain_rope(1e6), "tie_word_embeddings": False,
    }),
    "llama-3.2-1b": Architecture("llama", 32, 8, 64, 16, {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072, "rope_parameters": _llama3_rope(32.0), "tie_word_embeddings": True,
    }),
    "tiny": Architecture("llama", 4, 2, 16, 2, {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    }),
}  # fmt: skip
"""By the name that ``--model`` takes; ``tiny`` is for trying the command out on a CPU."""


def build_model(
    architecture: Architecture, dtype: torch.dtype, device: torch.device, seed: int, layers: int | None = None
) -> PreTrainedModel:
    """A model with random weights, drawn where they are used; ``layers`` takes fewer than the architecture has."""
    head_dim = {} if architecture.model_type == "qwen2" else {"head_dim": architecture.head_dim}  # which has no such field
    config = AutoConfig.for_model(
        architecture.model_type,
        num_hidden_layers=architecture.layers if layers is None else layers,
        num_attention_heads=architecture.heads,
        num_key_value_heads=architecture.kv_heads,
        bos_token_id=None,
        eos_token_id=None,
        **head_dim,
        **architecture.sizes,
    )
    family: Any = AutoModelForCausalLM  # which transformers leaves untyped
    torch.manual_seed(seed)
    with torch.device(device):
        model: PreTrainedModel = family.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.train(False)
    return model


def random_tokens(model: PreTrainedModel, length: int, seed: int) -> Tensor:
    """A prompt of random tokens, ``(1, length)``, on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.get_text_config().vocab_size, (1, length), generator=generator).to(model.device)


@torch.inference_mode()
def prefill(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """The logits of the first token to generate, ``(1, vocabulary)``, called as ``generate`` does: with mask and cache."""
    output = model(tokens, attention_mask=torch.ones_like(tokens), use_cache=True, logits_to_keep=1)
    logits: Tensor = output.logits[:, -1]
    return logits
