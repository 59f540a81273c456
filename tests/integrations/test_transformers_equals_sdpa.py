"""With everything kept, a model on "stem" is the model on "sdpa", whichever way it is called."""

from contextlib import contextmanager

import pytest
import torch

from .tiny import GEMMA3, KEEP_ALL, QWEN3, SMALL, build, hosts, left_padding, same, tokens, transformers

CONFIGS = {
    "llama": transformers.LlamaConfig(**SMALL),
    "qwen3-sliding": QWEN3,
    "gemma3": GEMMA3,
    "mixtral": transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
}
PADDED = left_padding([75, 40, 75, 61], 75)
HOLE = torch.ones(4, 75, dtype=torch.long)
HOLE[1, 30:40] = 0
CALLS = {
    "plain": {"use_cache": False},
    "mask of ones": {"attention_mask": torch.ones(4, 75, dtype=torch.long)},
    "left padded": {"attention_mask": PADDED, "position_ids": (PADDED.cumsum(1) - 1).clamp(min=0)},
    "right padded": {"attention_mask": PADDED.flip(1)},
    "dense: hole": {"attention_mask": HOLE},
    "dense: packed": {"position_ids": torch.cat([torch.arange(40), torch.arange(35)]).repeat(4, 1), "use_cache": False},
}
STATIC = pytest.mark.newer_host  # before transformers 5.14 a prefill over a static cache runs dense
GENERATE = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "chunked prefill": {"prefill_chunk_size": 40},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
}


@pytest.fixture(scope="module", params=CONFIGS)
def models(request):
    return [build(CONFIGS[request.param], name) for name in ("sdpa", "stem")]


@contextmanager
def kept_all(sparse=True):
    """Keep everything, and see to it that the sparse path was taken (or not)."""
    calls = []
    with torch.no_grad(), hosts.use_policy(KEEP_ALL, dense_below=0, observer=calls.append):
        yield
    assert any(call.sparse for call in calls) == sparse
    assert all(call.density == 1 for call in calls)


@pytest.mark.parametrize("name", CALLS)
def test_one_call(models, name):
    with kept_all(sparse=not name.startswith("dense")):
        host, stem = (model(input_ids=tokens(4, 75), **CALLS[name]).logits for model in models)
    same(stem, host, CALLS[name].get("attention_mask"))


def turns(model, cache, masks):
    """Prefill, two decode steps, a second turn and one more decode step over one cache."""
    for step, (length, mask) in enumerate(zip((50, 1, 1, 45, 1), masks, strict=True)):
        ids = tokens(2, length, seed=step)
        positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)[:, -length:]
        out = model(input_ids=ids, attention_mask=mask, past_key_values=cache, position_ids=positions, use_cache=True)
        yield out.logits if mask is None else out.logits[mask[:, -length:].bool()]


@pytest.mark.parametrize("static", [pytest.param(False, id="dynamic"), pytest.param(True, id="static", marks=STATIC)])
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_turns_over_a_cache(models, static, padded):
    pattern = left_padding([98, 81], 98)
    masks = [pattern[:, :end] if padded else None for end in (50, 51, 52, 97, 98)]
    kind, room = (transformers.StaticCache, {"max_cache_len": 120}) if static else (transformers.DynamicCache, {})
    with kept_all():
        results = [list(turns(model, kind(config=model.config, **room), masks)) for model in models]
    for host, stem in zip(*results, strict=True):
        same(stem, host)


@pytest.mark.parametrize(
    "options", [pytest.param(value, id=name, marks=[STATIC] * ("static" in name)) for name, value in GENERATE.items()]
)
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_generate(models, options, padded):
    given = {"attention_mask": left_padding([90, 71 if padded else 90], 90), "max_new_tokens": 8, "do_sample": False, **options}
    with kept_all():
        host, stem = (model.generate(tokens(2, 90), **given).tolist() for model in models)
    assert stem == host


def test_short_prompts_are_bit_equal(models):
    """No policy at all: prompts of this length are left to the host."""
    for inputs in ({}, {"attention_mask": PADDED}):
        with torch.no_grad():
            host, stem = (model(tokens(4, 75), **inputs).logits for model in models)
        assert torch.equal(stem, host)
