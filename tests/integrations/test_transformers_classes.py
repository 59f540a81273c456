"""Every class of transformers that builds at toy size sees no future on "stem", and computes what its host does."""

import re
from copy import deepcopy

import pytest
import torch
from packaging.version import Version

from stem_attention import UnsupportedError

from . import toys
from .tiny import KEEP_ALL, SMALL, hosts, normal, observed, same, small_llama, tokens, transformers


def test_no_class_sees_the_future_or_differs_from_its_host():
    """Sets the last token apart, pads at the left, and compares; dense and refused classes are listed on the page."""
    rows = toys.rows()
    assert [row.fault for row in rows if row.fault] == []
    assert len(rows) >= 200
    assert sum(row.runs == "sparse" for row in rows) >= 150


@pytest.mark.parametrize(
    "names",
    [
        ("Qwen3", "Olmo2", "Apertus"),  # normed queries and keys
        ("Phi", "GPTNeoX", "StableLm", "Glm4"),  # a part of each head is rotated
        ("SmolLM3",),  # a layer without positions
        ("Cohere", "Granite", "HunYuanDenseV1"),  # scaled logits or scores
    ],
)
def test_what_is_done_to_queries_keys_and_logits_does_not_matter(names):
    ran = {row.name: (row.runs, set(row.layers)) for row in toys.rows()}
    assert {ran[f"{name}ForCausalLM"] == ("sparse", {None}) for name in names} == {True}


def test_hybrids_run_their_full_layers_sparse():
    of_kind = {
        "Gemma3": "sliding window",
        "Cohere2": "sliding window",
        "Llama4": "chunk of the prompt",
        "Qwen3Next": "no attention",
    }
    ran = {row.name: row.layers for row in toys.rows()}
    for name, reason in of_kind.items():
        found = ran[f"{name}ForCausalLM"]
        assert set(found) == {None, reason}
        assert 0 < found[None] < found[reason]


def test_the_cookbook_says_of_every_class_what_the_sweep_says():
    page = (toys.PAGE.parent / "cookbook.md").read_text()
    said = re.findall(r"^\| [^|]+ \| (`[^|]+`) \| (all|\d+ of \d+) \|", page, re.MULTILINE)
    ran = {row.name: row for row in toys.rows()}
    assert len(said) >= 15
    for names, share in said:
        for name in set(re.findall(r"`(\w+)`", names)):
            sparse, total = ran[name].layers[None], ran[name].layers.total()
            assert share == ("all" if sparse == total > 0 else f"{sparse} of {total}"), name


def test_the_page_lists_the_classes():
    pins = (toys.PAGE.parents[1] / "constraints.txt").read_text()
    if f"\ntransformers=={transformers.__version__};" not in pins:
        pytest.skip("the page is about the transformers of constraints.txt")
    assert toys.page() == toys.PAGE.read_text(), "run `python -m tests.integrations.toys`"


NEW = Version(transformers.__version__) >= Version("5.24")
GPT_J = pytest.param("GPTJForCausalLM", marks=pytest.mark.skipif(NEW, reason="it runs other attention from 5.24 on"))


@pytest.mark.parametrize("name", ["BloomForCausalLM", "TrOCRForCausalLM", GPT_J, "LEDForConditionalGeneration"])
def test_a_class_that_keeps_its_own_attention_is_refused_at_load_by_name(name, tmp_path):
    """Of GPT-J transformers itself says KeyError: 'stem'; of the others nothing."""
    model = toys.build(getattr(transformers, name), None)
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=f'{name} keeps its own attention: .* load it with attn_implementation="eager"'):
        type(model).from_pretrained(tmp_path, attn_implementation="stem")
    with pytest.raises(UnsupportedError, match=f"{name} keeps its own attention"):
        hosts.set_policy(model)


@pytest.mark.parametrize(
    ("name", "kind", "reasons"),
    [
        ("GotOcr2ForConditionalGeneration", "vision-text", {"prefill"}),
        ("BartForConditionalGeneration", "seq2seq", {"prefill", "not causal"}),
    ],
)
def test_what_a_composite_model_is_told_reaches_its_text(name, kind, reasons):
    """One has a tower that keeps its own attention; of the other transformers copies the config of the decoder."""
    model = toys.build(getattr(transformers, name), "stem")
    if kind == "vision-text":
        assert (model.config._attn_implementation, model.config.text_config._attn_implementation) == ("eager", "stem")
    hosts.set_policy(model, KEEP_ALL, dense_below=0)
    calls = []
    with hosts.use_policy(observer=calls.append):
        toys.logits(model, kind)
    assert {call.reason for call in calls} == reasons


def test_a_class_of_ones_own_that_says_nothing_of_sdpa_gets_a_mask():
    """Its layers do not say that they are causal, and its config is defined elsewhere."""
    own = type("OwnConfig", (transformers.LlamaConfig,), {"__module__": "elsewhere", "model_type": "own"})(**SMALL)
    own_class = type("OwnForCausalLM", (transformers.LlamaForCausalLM,), {"_supports_sdpa": False, "__module__": "elsewhere"})
    torch.manual_seed(0)
    model = own_class._from_config(own, attn_implementation="stem").eval()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    ids = tokens()
    first, calls = observed(model, input_ids=ids)
    ids[0, -1] = 96 - ids[0, -1]
    torch.testing.assert_close(observed(model, input_ids=ids)[0][:, :-1], first[:, :-1])
    assert {call.reason for call in calls} == {"its class supports eager attention alone"}


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Gemma2ForCausalLM", "prefill"),
        ("GptOssForCausalLM", "prefill"),
        ("DeepseekV3ForCausalLM", "prefill"),
    ],
)
def test_layers_of_other_forms_equal_eager_over_a_cache(name, reason, padded):
    models = [toys.build(getattr(transformers, name), attention) for attention in ("stem", "eager")]
    mask = torch.ones(2, 100, dtype=torch.long)
    mask[1, : 30 * padded] = 0
    caches = [transformers.DynamicCache(config=model.config) for model in models]
    for start, end in ((0, 60), (60, 99), (99, 100)):
        inputs = {"input_ids": tokens(2, 100)[:, start:end], "attention_mask": mask[:, :end]}
        (found, calls), (expected, _) = (
            observed(model, past_key_values=cache, **inputs) for model, cache in zip(models, caches, strict=True)
        )
        same(found, expected, mask[:, start:end])
        if start == 0:
            assert {call.reason for call in calls} - {"sliding window"} == {reason}


def test_attention_weights_come_from_the_eager_function():
    stem, eager = small_llama(), small_llama("eager")
    x, mask = normal(1, 70, SMALL["hidden_size"]), torch.full((1, 1, 70, 70), torch.finfo(torch.float32).min).triu(1)
    options = {"position_embeddings": stem.model.rotary_emb(x, torch.arange(70)[None]), "output_attentions": True}
    with torch.no_grad(), hosts.use_policy(KEEP_ALL, dense_below=0):
        found = stem.model.layers[0].self_attn(x, attention_mask=None, **options)
        expected = eager.model.layers[0].self_attn(x, attention_mask=mask, **options)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["softcap", "s_aux", "output_attentions", "indices"])
def test_a_layer_that_nobody_can_run_is_refused(name):
    q = torch.zeros(1, 2, 64, 16)
    message = "Module selects keys itself" if name == "indices" else "Module needs eager attention"
    with pytest.raises(UnsupportedError, match=message):
        hosts.attention_forward(torch.nn.Module(), q, q, q, None, **{name: True})


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("not causal", {"is_causal": False}),
        ("position bias", {"position_bias": torch.zeros(1, 2, 64, 96)}),
        ("custom mask", {"attention_mask": torch.ones(1, 1, 64, 96, dtype=torch.bool).tril(32)}),
        ("dropout", {"dropout": 1e-9}),
    ],
)
def test_calls_that_are_dense_over_a_cached_prefix_equal_the_host(reason, change):
    q, k, v = (normal(1, 2, length, 16, seed=i) for i, length in enumerate((64, 96, 96)))
    calls = []
    with hosts.use_policy(KEEP_ALL, dense_below=0, observer=calls.append):
        out, _ = hosts.attention_forward(torch.nn.Module(), q, k, v, **{"attention_mask": None, **change})
    allowed = None if reason == "not causal" else torch.ones(64, 96, dtype=torch.bool).tril(32)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    assert [(call.layer, call.sparse, call.reason) for call in calls] == [(-1, False, reason)]


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
def test_a_text_tower_on_stem_beside_a_vision_tower_on_sdpa(image):
    """The config of the sweep's toy has a token for images, 120, and pictures of 32 x 32 pixels."""
    config = toys.toy_config(transformers.Gemma3Config)
    config.mm_tokens_per_image = 4
    config.text_config.layer_types = ["full_attention"] * 2
    stem, host = (
        toys.seeded(transformers.Gemma3ForConditionalGeneration, deepcopy(config), attention)
        for attention in ({"text_config": "stem", "vision_config": "sdpa"}, "sdpa")
    )
    hosts.set_policy(stem, KEEP_ALL, dense_below=0)
    ids = tokens(1, 100)
    inputs = {"input_ids": ids}
    if image:
        ids[0, 10:14] = config.image_token_id
        inputs |= {"pixel_values": normal(1, 3, 32, 32), "token_type_ids": (ids == config.image_token_id).long()}
    calls = []
    with torch.no_grad(), hosts.use_policy(observer=calls.append):
        same(stem(**inputs).logits, host(**inputs).logits)
    assert [call.reason for call in calls] == ["custom mask" if image else "prefill"] * 2
