"""With everything kept, a model on "stem" is the model on "sdpa", whichever way it is called."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from stem_attention.integrations.transformers import LayerCall, configure, register

from .tiny import KEEP_ALL, MIXED, SMALL, build

transformers = pytest.importorskip("transformers")
register()

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "qwen3-sliding": lambda: transformers.Qwen3Config(**SMALL, **MIXED, use_sliding_window=True, max_window_layers=1),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SMALL, **MIXED),
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
}


@pytest.fixture(scope="module", params=CONFIGS)
def models(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    host, stem = build(CONFIGS[request.param](), "sdpa"), build(CONFIGS[request.param](), "stem")
    stem.load_state_dict(host.state_dict())
    return host, stem


@contextmanager
def kept_all(sparse: bool = True) -> Iterator[None]:
    """Keep everything, and see to it that the sparse path was taken (or not)."""
    calls: list[LayerCall] = []
    with torch.no_grad(), configure(KEEP_ALL, observer=calls.append):
        yield
    assert any(call.sparse for call in calls) == sparse
    assert all(call.selection.density() == 1.0 for call in calls if call.selection is not None)


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padding(lengths: list[int], width: int) -> Tensor:
    return torch.tensor([[int(i >= width - length) for i in range(width)] for length in lengths])


def compare(models: tuple[Any, Any], sparse: bool = True, real: Tensor | None = None, **inputs: Any) -> None:
    with kept_all(sparse):
        host, stem = (model(**inputs).logits for model in models)
    if real is not None:
        host, stem = host[real], stem[real]
    torch.testing.assert_close(stem, host, atol=2e-4, rtol=1e-4)


def test_prefill(models: tuple[Any, Any]) -> None:
    compare(models, input_ids=tokens(2, 75), use_cache=False)


def test_prefill_with_a_mask_of_ones(models: tuple[Any, Any]) -> None:
    compare(models, input_ids=tokens(2, 75), attention_mask=torch.ones(2, 75, dtype=torch.long))


def test_left_padded_batch(models: tuple[Any, Any]) -> None:
    mask = left_padding([75, 40, 75, 61], 75)
    compare(
        models, real=mask.bool(), input_ids=tokens(4, 75), attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
    )


def test_right_padded_batch(models: tuple[Any, Any]) -> None:
    mask = left_padding([75, 40], 75).flip(1)
    compare(models, real=mask.bool(), input_ids=tokens(2, 75), attention_mask=mask)


def test_a_mask_with_a_hole_is_dense_and_right(models: tuple[Any, Any]) -> None:
    mask = torch.ones(2, 75, dtype=torch.long)
    mask[1, 30:40] = 0
    compare(models, sparse=False, real=mask.bool(), input_ids=tokens(2, 75), attention_mask=mask)


def test_packed_sequences(models: tuple[Any, Any]) -> None:
    positions = torch.cat([torch.arange(40), torch.arange(35)])[None]
    compare(models, sparse=False, input_ids=tokens(1, 75), position_ids=positions, use_cache=False)


def turns(model: Any, cache: Any, masks: list[Tensor | None]) -> list[Tensor]:
    """Prefill, two decode steps, a second turn and one more decode step over one cache."""
    logits = []
    for step, (length, mask) in enumerate(zip((50, 1, 1, 45, 1), masks, strict=True)):
        ids = tokens(2, length, seed=step)
        positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)[:, -length:]
        out = model(input_ids=ids, attention_mask=mask, past_key_values=cache, position_ids=positions, use_cache=True)
        logits.append(out.logits if mask is None else out.logits[mask[:, -length:].bool()])
    return logits


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_turns_over_a_cache(models: tuple[Any, Any], static: bool, padded: bool) -> None:
    pattern = left_padding([98, 81], 98)
    masks = [pattern[:, :end] if padded else None for end in (50, 51, 52, 97, 98)]
    results = []
    with kept_all():
        for model in models:
            cache = (
                transformers.StaticCache(config=model.config, max_cache_len=120)
                if static
                else transformers.DynamicCache(config=model.config)
            )
            results.append(turns(model, cache, masks))
    for host, stem in zip(*results, strict=True):
        torch.testing.assert_close(stem, host, atol=2e-4, rtol=1e-4)


GENERATE: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "chunked prefill": {"prefill_chunk_size": 40},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
}


@pytest.mark.parametrize("options", GENERATE.values(), ids=GENERATE)
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_generate(models: tuple[Any, Any], options: dict[str, Any], padded: bool) -> None:
    mask = left_padding([90, 71 if padded else 90], 90)
    with kept_all():
        host, stem = (
            model.generate(tokens(2, 90), attention_mask=mask, max_new_tokens=8, do_sample=False, **options) for model in models
        )
    assert stem.tolist() == host.tolist()


def test_short_prompts_are_bit_equal(models: tuple[Any, Any]) -> None:
    """No config at all: ``dense_below`` sends prompts of this length to the host."""
    mask = left_padding([75, 40], 75)
    for inputs in ({"input_ids": tokens(2, 75)}, {"input_ids": tokens(2, 75), "attention_mask": mask}):
        with torch.no_grad():
            host, stem = (model(**inputs).logits for model in models)
        assert torch.equal(stem, host)
