"""Tiny transformers models with random weights, and how the integration's tests call them."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from tests.toys import SIZES
from torch import Tensor

from stem_attention import Mass
from stem_attention.policies import Dense

transformers = pytest.importorskip("transformers")
hosts = pytest.importorskip("stem_attention.integrations.transformers")

KEEP_ALL = Dense(block_size=16)
BY_MASS = Mass(block_size=16, query_pool=4, key_pool=4, tail_blocks=1, local_blocks=1)
FACTORS = ((0.1, 0.5, 2.0, 9.0), (4.0, 4.0, 0.2, 1.0), (0.3, 6.0, 1.0, 1.0))
SMALL: dict[str, Any] = {
    **SIZES, "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 16,
    "initializer_range": 0.2, "eos_token_id": None,
}  # fmt: skip
MIXED = {"sliding_window": 24, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
QWEN3 = transformers.Qwen3Config(**SMALL, **MIXED, use_sliding_window=True, max_window_layers=1)
GEMMA3 = transformers.Gemma3TextConfig(**SMALL, **MIXED)


def build(config: Any, attention: Any = "stem") -> Any:
    """A model of a config, the same weights every time."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation=attention).eval()


def small_llama(attention: str = "stem", **changes: Any) -> Any:
    return build(transformers.LlamaConfig(**{**SMALL, **changes}), attention)


def tokens(batch: int = 1, length: int = 320, seed: int = 1) -> Tensor:
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def left_padding(lengths: list[int], width: int) -> Tensor:
    """The 2D mask of a batch whose rows end together."""
    return torch.tensor([[int(i >= width - length) for i in range(width)] for length in lengths])


def observed(model: Any, policy: Any = KEEP_ALL, **inputs: Any) -> tuple[Tensor, list[Any]]:
    """Logits and calls of a model under a policy, which is sparse at any length unless told otherwise."""
    given = {name: inputs.pop(name) for name in ("dense_below", "dense_layers", "prompt_len") if name in inputs}
    calls: list[Any] = []
    with torch.no_grad(), hosts.use_policy(policy, observer=calls.append, **{"dense_below": 0, **given}):
        return model(**inputs).logits, calls


def logits(model: Any, policy: Any = KEEP_ALL, **inputs: Any) -> Tensor:
    """Logits of a model under a policy, selection and attention in one call."""
    with torch.no_grad(), hosts.use_policy(policy, dense_below=0):
        out: Tensor = model(**inputs).logits
    return out


def same(found: Tensor, expected: Tensor, real: Tensor | None = None) -> None:
    """Compare logits, of real tokens alone."""
    rows = slice(None) if real is None else real.bool()
    torch.testing.assert_close(found[rows], expected[rows], atol=2e-4, rtol=1e-4)
