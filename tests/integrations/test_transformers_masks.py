"""Masks of a model on "stem" are what hosts expect of a mask, however they treat it, and windows cost what they hide."""

import gc
from weakref import ref

import pytest
import torch
from torch import Tensor

from stem_attention import BlockSelection, UnsupportedError
from stem_attention.integrations.transformers import attention, dense, mask
from stem_attention.integrations.transformers.mask import CausalMask, stem_mask

from . import tiny
from .tiny import KEEP_ALL, SMALL, build, hosts, left_padding, logits, normal, observed, same, tokens, transformers

masking = pytest.importorskip("transformers.masking_utils")

PADDING = left_padding([96, 61], 96).bool()
SHARED = {  # the layout of Gemma 4 E2B and E4B: the last layers reuse the keys of earlier ones
    **SMALL, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 24,
    "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 97, "global_head_dim": 16,
}  # fmt: skip
FOUR = ["sliding_attention"] * 3 + ["full_attention"]
MODELS = {"qwen3": tiny.QWEN3, "gemma3": tiny.GEMMA3, "gemma4": transformers.Gemma4TextConfig(**SHARED)}
KEPT = {
    "contiguous": lambda x: x.contiguous(),
    "clone": lambda x: x.clone(),
    "to": lambda x: x.to("cpu"),
    "last query": lambda x: x[:, :, slice(-1, None), :],
    "queries": lambda x: x[:, :, 3:-4],
    "keys": lambda x: x[:, :, :, :96],
    "both": lambda x: x[..., 8:30, 3:90],
}
READ = {
    "sum": lambda x: x.sum(),
    "not": lambda x: ~x,
    "where": lambda x: torch.where(x, 0.0, -1.0),
    "cat": lambda x: torch.cat([x, torch.ones_like(x)], -1),
    "index": lambda x: x[:, :, torch.tensor([3, 5])],
    "copied": lambda x: torch.zeros(x.shape, dtype=torch.bool).copy_(x),
    "float": lambda x: x.to(torch.float32),
}
VIEWS = {
    "expand": lambda x: x.expand(-1, 4, -1, -1),
    "steps": lambda x: x[:, :, ::2],
    "row": lambda x: x[1],
}


@pytest.fixture(scope="module", params=MODELS)
def models(request):
    return [build(MODELS[request.param], name) for name in ("stem", "sdpa")]


def window_config(window):
    return transformers.MistralConfig(**SMALL, sliding_window=window)


def compact(q_len, kv_len, window, padding):
    """A mask of the last queries that has not been built, and its entries as "sdpa" gets them."""
    config = None if window is None else window_config(window)
    causal = masking.causal_mask_function if window is None else masking.sliding_window_causal_mask_function(window)
    given = {
        "batch_size": 2, "q_length": q_len, "kv_length": kv_len, "q_offset": 96 - q_len, "mask_function": causal,
        "attention_mask": padding, "local_size": window,
    }  # fmt: skip
    found = stem_mask(**given, config=config)
    assert isinstance(found, CausalMask)
    return found, masking.sdpa_mask(**given, allow_is_causal_skip=False)


@pytest.mark.parametrize("padding", [PADDING, None], ids=["padded", "plain"])
@pytest.mark.parametrize("window", [None, 20], ids=["causal", "window"])
@pytest.mark.parametrize(("q_len", "kv_len"), [(96, 120), (40, 120), (40, 96)], ids=["static", "continued", "dynamic"])
def test_a_mask_has_the_entries_of_sdpa_whatever_a_host_does_with_it(q_len, kv_len, window, padding, monkeypatch):
    monkeypatch.setattr(mask, "WHOLE_MASK_ENTRIES", 0)
    if window is None and padding is None and kv_len == 96:
        pytest.skip("no mask is needed")
    found, entries = compact(q_len, kv_len, window, padding)
    assert (found.shape, found.dtype, found.dim()) == (entries.shape, torch.bool, 4)
    for name, change in KEPT.items():
        part = change(found)
        assert isinstance(part, CausalMask), name
        assert torch.equal(part.entries(), change(entries)), name
    elsewhere = found.to("meta")
    assert isinstance(elsewhere, CausalMask)
    assert {elsewhere.device.type, elsewhere.entries().device.type} == {"meta"}
    for name, change in READ.items():
        assert type(change(found)) is Tensor, name
        assert torch.equal(change(found), change(entries)), name
    for name, change in VIEWS.items():
        found, _ = compact(q_len, kv_len, window, padding)
        assert torch.equal(change(found), change(entries)), name
        assert found.changed, name


def test_a_mask_that_a_host_wrote_into_or_cut_short_is_read_as_it_is():
    found, entries = compact(96, 120, None, PADDING)
    for writing in (lambda x: x[:, :, :40, 90:].fill_(True), lambda x: x.bitwise_or_(torch.eye(96, 120, dtype=torch.bool))):
        with pytest.raises(UnsupportedError, match="cannot be written to"):
            writing(found)
    found[0, :, :40], entries[0, :, :40] = True, True
    whole, q = compact(96, 120, None, PADDING), normal(2, 4, 96, 16)
    for given, expected in ((found, entries), (whole[0][..., :50], whole[1][..., :50])):
        k = q[:, :, : expected.shape[3]]
        call = dense.HostCall(torch.nn.Module(), q, k, k, given, {})
        assert call.causal is None
        assert torch.equal(call.mask, expected)


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("way", ["one mask", "pieces", "kernel"])
def test_windows_are_exact_however_long(models, way, padded, monkeypatch):
    """Beyond a size masks are not built whole; a low limit shows it on a short prompt. Short prompts run as the host would."""
    ran = []
    attend = attention.block_sparse_attention
    monkeypatch.setattr(attention, "block_sparse_attention", lambda *a, **b: ran.append(b.get("window")) or attend(*a, **b))
    if way != "one mask":
        monkeypatch.setattr(mask, "WHOLE_MASK_ENTRIES", 0)
        monkeypatch.setattr(dense, "_MIN_WINDOW_ROWS", 50)
    pattern = left_padding([320, 230 if padded else 320], 320)
    caches = [transformers.DynamicCache(config=model.config) for model in models]
    full = "short prompt" if way == "pieces" else "prefill"
    names = {"full_attention": full, "sliding_attention": "sliding window"}
    reasons = {layer: names[kind] for layer, kind in enumerate(models[0].config.layer_types)}
    for start, end in ((0, 200), (200, 320)):
        inputs = {"input_ids": tokens(2)[:, start:end], "attention_mask": pattern[:, :end]}
        below = {"dense_below": 1000 if way == "pieces" else 0}
        out, calls = observed(models[0], past_key_values=caches[0], **below, **inputs)
        same(out, logits(models[1], past_key_values=caches[1], **inputs), pattern[:, start:end])
        assert {call.layer: call.reason for call in calls} == reasons
        assert not any(call.sparse for call in calls if call.reason == "sliding window")
    assert {x is not None for x in ran} == {"one mask": {False}, "pieces": set(), "kernel": {False, True}}[way]


def test_layers_with_a_window_share_its_blocks_for_a_prefill_and_no_longer(monkeypatch):
    """Rows of two lengths have lists of their own; nothing outlives the masks."""
    built, make = [], BlockSelection.of_window
    monkeypatch.setattr(BlockSelection, "of_window", lambda *a, **b: built.append(ref(blocks := make(*a, **b))) or blocks)
    monkeypatch.setattr(mask, "WHOLE_MASK_ENTRIES", 0)
    model = build(transformers.Gemma3TextConfig(**{**SMALL, "num_hidden_layers": 4}, sliding_window=24, layer_types=FOUR))
    for lengths, expected in (([320, 320], 1), ([320, 230], 2), ([320, 320], 1)):
        _, calls = observed(model, input_ids=tokens(2), attention_mask=left_padding(lengths, 320))
        assert sum(call.reason == "sliding window" for call in calls) == 3 * expected
        assert len(built) == expected
        gc.collect()
        assert not any(blocks() for blocks in built)
        built.clear()


@pytest.mark.parametrize("config", [
    transformers.GptOssConfig(**SMALL, **tiny.MIXED, num_local_experts=4, num_experts_per_tok=2),
    transformers.Gemma2Config(**SMALL, **tiny.MIXED, query_pre_attn_scalar=16),
], ids=["sinks", "cap"])  # fmt: skip
def test_windows_with_sinks_and_caps_are_those_of_eager_attention(config, monkeypatch):
    monkeypatch.setattr(mask, "WHOLE_MASK_ENTRIES", 0)
    model, inputs = build(config), {"input_ids": tokens()}
    found, calls = observed(model, **inputs)
    assert {call.reason for call in calls} == {"prefill", "sliding window"}
    monkeypatch.setattr(attention, "block_sparse_attention", None)
    model.set_attn_implementation("eager")
    same(found, logits(model, **inputs))


@pytest.mark.parametrize("cache", ["static", None], ids=["static", "dynamic"])
@pytest.mark.parametrize("lengths", [[4200], [90, 60], [12, 7]], ids=["long", "padded", "short"])
def test_generate(models, lengths, cache):
    """More than 4096 tokens: a mask of so many is not built whole."""
    inputs = {"inputs": tokens(len(lengths), lengths[0]), "attention_mask": left_padding(lengths, lengths[0])}
    options = {"cache_implementation": cache, "max_new_tokens": 3, "do_sample": False, "disable_compile": True}
    with hosts.use_policy(KEEP_ALL):
        answers = [model.generate(**inputs, **options).tolist() for model in models]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("config", "lengths", "last"),
    [
        (transformers.Phi3Config(**{**SMALL, "num_key_value_heads": 4}, sliding_window=262144), [320], "prefill"),
        (window_config(320), [320], "prefill"),
        (window_config(319), [320], "sliding window"),
        (window_config(200), [100, 100, 100], "sliding window"),
        (transformers.Gemma3TextConfig(**SMALL, **{**tiny.MIXED, "sliding_window": 400}), [320], "prefill"),
    ],
    ids=["phi", "just not reached", "just reached", "reached by the third chunk", "mixed"],
)
def test_a_window_that_hides_nothing_runs_sparse(config, lengths, last):
    models, reasons = [build(config, name) for name in ("stem", "sdpa")], []
    caches = [transformers.DynamicCache(config=config) for _ in models]
    for length in lengths:
        out, calls = observed(models[0], input_ids=tokens(length=length), past_key_values=caches[0])
        same(out, logits(models[1], input_ids=tokens(length=length), past_key_values=caches[1]))
        reasons.append({call.reason for call in calls})
    assert reasons == [{"prefill"}] * (len(lengths) - 1) + [{last}]


def test_a_window_that_hides_nothing_runs_sparse_for_a_padded_batch_and_in_a_static_cache():
    pattern, results = left_padding([120, 70], 120), []
    for name in ("stem", "sdpa"):
        model = build(window_config(150), name)
        cache = transformers.StaticCache(config=model.config, max_cache_len=300)
        results.append(observed(model, input_ids=tokens(2, 120), attention_mask=pattern, past_key_values=cache))
    same(results[0][0], results[1][0], pattern)
    assert {call.reason for call in results[0][1]} == {"prefill"}


def test_torch_compile_runs_a_window_that_hides_nothing_sparse():
    torch.compiler.reset()
    model = build(window_config(400))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    policy = "sink-window:block_size=16,window_blocks=2"
    found, expected, whole = (logits(*given, input_ids=tokens()) for given in ((compiled, policy), (model, policy), (model,)))
    torch.testing.assert_close(found, expected)
    assert (found - whole).abs().max() > 0.01


@pytest.mark.parametrize(("name", "lengths"), [("qwen3", [90, 90]), ("gemma3", [90, 60])], ids=["plain", "padded"])
def test_a_compiled_model_takes_masks_that_generate_has_built(name, lengths):
    answers = []
    for implementation in ("sdpa", "stem"):
        torch.compiler.reset()
        model = build(MODELS[name], implementation)
        model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
        inputs = {"inputs": tokens(2, 90), "attention_mask": left_padding(lengths, 90), "cache_implementation": "static"}
        with hosts.use_policy(KEEP_ALL, dense_below=0):
            answers.append(model.generate(**inputs, max_new_tokens=3, do_sample=False, disable_compile=True).tolist())
    assert answers[0] == answers[1]
