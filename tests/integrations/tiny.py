"""Tiny transformers models with random weights, shared by the integration's tests."""

from typing import Any

import pytest
import torch

from stem_attention import StemConfig

transformers = pytest.importorskip("transformers")

KEEP_ALL = StemConfig(dense_below=0, ratio_short=1, ratio_long=1, decay=1, block_size=16, stride=4)
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
MIXED = {"sliding_window": 24, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}


def build(config: Any, attention: Any = "stem") -> Any:
    """A model of a config, the same weights every time."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
