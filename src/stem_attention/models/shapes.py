"""Attention heads of known models."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Heads:
    """Attention heads of a model."""

    heads: int
    kv_heads: int
    head_dim: int


MODELS = {
    "llama-3.1-8b": Heads(32, 8, 128),
    "qwen3-8b": Heads(32, 8, 128),
    "qwen2.5-7b": Heads(28, 4, 128),
    "llama-3.2-1b": Heads(32, 8, 64),
    "gemma": Heads(8, 4, 256),
}
