"""Models as people run them, with random weights: the time of a prefill does not depend on what they are."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from stem_attention.models.shapes import MODELS, Heads
from stem_evals.bench.timing import host_seconds


class Architecture(NamedTuple):
    """The sizes of a model, by which its time goes; the rest of its config is what transformers takes by default."""

    model_type: str
    heads: Heads
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    tied: bool
    """Tell whether input and output embeddings are one."""


ARCHITECTURES = {
    "llama-3.1-8b": Architecture("llama", MODELS["llama-3.1-8b"], 32, 4096, 14336, 128256, tied=False),
    "qwen3-8b": Architecture("qwen3", MODELS["qwen3-8b"], 36, 4096, 12288, 151936, tied=False),
    "qwen2.5-7b": Architecture("qwen2", MODELS["qwen2.5-7b"], 28, 3584, 18944, 152064, tied=False),
    "llama-3.2-1b": Architecture("llama", MODELS["llama-3.2-1b"], 16, 2048, 8192, 128256, tied=True),
    "tiny": Architecture("llama", Heads(4, 2, 16), 2, 64, 128, 256, tied=True),
}
"""By the name that ``--model`` takes; ``tiny`` is for trying the command out on a CPU."""


def build_model(
    architecture: Architecture, dtype: torch.dtype, device: torch.device, seed: int, layers: int | None = None
) -> PreTrainedModel:
    """A model with random weights, drawn where they are used; ``layers`` takes fewer than the architecture has."""
    heads = architecture.heads
    config = AutoConfig.for_model(
        architecture.model_type,
        num_hidden_layers=layers or architecture.layers,
        num_attention_heads=heads.heads,
        num_key_value_heads=heads.kv_heads,
        hidden_size=architecture.hidden,
        intermediate_size=architecture.intermediate,
        vocab_size=architecture.vocabulary,
        tie_word_embeddings=architecture.tied,
        max_position_embeddings=1 << 20,
        bos_token_id=None,
        eos_token_id=None,
        **({} if architecture.model_type == "qwen2" else {"head_dim": heads.head_dim}),  # which has no such field
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


def prefill_seconds(model: PreTrainedModel, tokens: Tensor) -> float:
    """From the call to the logits, the host's part included."""
    return host_seconds(tokens.device, partial(prefill, model, tokens))
