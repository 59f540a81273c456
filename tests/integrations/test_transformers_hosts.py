"""What models of other kinds do on "stem", and how a config travels with its model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stem_attention import StemConfig, UnsupportedError
from stem_attention.integrations.transformers import LayerCall, attention_forward, configure, register, set_config

from . import tiny
from .tiny import KEEP_ALL, build

transformers = pytest.importorskip("transformers")
register()

SMALL = {**tiny.SMALL, "num_hidden_layers": 2}
GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 24}
LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12,
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip


def tokens(batch: int = 1, length: int = 100) -> Tensor:
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def observed(model: Any, **inputs: Any) -> tuple[Any, list[LayerCall]]:
    calls: list[LayerCall] = []
    with torch.no_grad(), configure(KEEP_ALL, observer=calls.append):
        return model(**inputs), calls


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize(
    ("config", "reasons"),
    [
        (lambda: transformers.Gemma2Config(**SMALL, sliding_window=24), ["sliding window", "soft-capped scores"]),
        (lambda: transformers.GptOssConfig(**SMALL, **GPT_OSS), ["sliding window", "attention sinks"]),
        (
            lambda: transformers.DeepseekV3Config(**{**SMALL, "num_key_value_heads": 4, "head_dim": 8}, **LATENT),
            ["value dimension"] * 2,
        ),
    ],
    ids=["gemma2", "gpt-oss", "deepseek-v3"],
)
def test_layers_that_stem_cannot_run_equal_eager(config: Any, reasons: list[str], padded: bool) -> None:
    stem, eager = build(config()), build(config(), "eager")
    stem.load_state_dict(eager.state_dict())
    mask = torch.ones(2, 100, dtype=torch.long)
    mask[1, : 30 * padded] = 0
    caches = [transformers.DynamicCache(config=model.config) for model in (stem, eager)]
    for start, end in ((0, 60), (60, 99), (99, 100)):
        inputs = {"input_ids": tokens(2)[:, start:end], "attention_mask": mask[:, :end]}
        out, calls = observed(stem, past_key_values=caches[0], **inputs)
        expected, _ = observed(eager, past_key_values=caches[1], **inputs)
        real = mask[:, start:end].bool()
        torch.testing.assert_close(out.logits[real], expected.logits[real], atol=2e-4, rtol=1e-4)
        assert all(call.reason.startswith(reason) for call, reason in zip(calls, reasons, strict=True))


def test_attention_weights_come_from_the_eager_function() -> None:
    config = transformers.LlamaConfig(**SMALL)
    stem, eager = build(config), build(transformers.LlamaConfig(**SMALL), "eager")
    layers = [model.model.layers[0].self_attn for model in (stem, eager)]
    x = torch.randn(1, 70, 64, generator=torch.Generator().manual_seed(0))
    angles = stem.model.rotary_emb(x, torch.arange(70)[None])
    mask = torch.full((70, 70), torch.finfo(torch.float32).min).triu(1)[None, None]
    with torch.no_grad(), configure(KEEP_ALL):
        out, weights = layers[0](x, angles, None, output_attentions=True)
        expected, expected_weights = layers[1](x, angles, mask)
    torch.testing.assert_close((out, weights), (expected, expected_weights))


@pytest.mark.parametrize("name", ["softcap", "s_aux", "output_attentions"])
def test_a_layer_without_an_eager_function_is_refused(name: str) -> None:
    q = torch.zeros(1, 2, 64, 16)
    with pytest.raises(UnsupportedError, match="Module has"):
        attention_forward(torch.nn.Module(), q, q, q, None, **{name: True})


def test_a_model_that_selects_keys_itself_is_refused() -> None:
    q = torch.zeros(1, 2, 64, 16)
    with pytest.raises(UnsupportedError, match="selects keys itself"):
        attention_forward(torch.nn.Module(), q, q, q, None, indices=torch.zeros(1))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"is_causal": False}, "not causal"),
        ({"position_bias": torch.zeros(1, 2, 64, 96)}, "position bias"),
        ({"attention_mask": torch.ones(1, 1, 64, 96, dtype=torch.bool).tril(32)}, "custom mask"),
        ({"dropout": 1e-9}, "dropout"),
    ],
    ids=["is_causal", "position_bias", "mask", "dropout"],
)
def test_calls_that_are_dense_over_a_cached_prefix_equal_the_host(change: dict[str, Any], reason: str) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, length, 16, generator=g) for length in (64, 96, 96))
    calls: list[LayerCall] = []
    with configure(KEEP_ALL, observer=calls.append):
        out, _ = attention_forward(torch.nn.Module(), q, k, v, **{"attention_mask": None, **change})
    allowed = None if reason == "not causal" else torch.ones(64, 96, dtype=torch.bool).tril(32)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    assert [(call.layer, call.sparse, call.reason) for call in calls] == [(-1, False, reason)]


def vision_language_config() -> Any:
    text = transformers.Gemma3TextConfig(**{**SMALL, "vocab_size": 120}, layer_types=["full_attention"] * 2)
    vision = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    return transformers.Gemma3Config(
        text_config=text.to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=4, image_token_id=110
    )


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
def test_a_text_tower_on_stem_beside_a_vision_tower_on_sdpa(image: bool) -> None:
    stem, host = (
        transformers.Gemma3ForConditionalGeneration._from_config(vision_language_config(), attn_implementation=attention).eval()
        for attention in ({"text_config": "stem", "vision_config": "sdpa"}, "sdpa")
    )
    stem.load_state_dict(host.state_dict())
    set_config(stem, KEEP_ALL)
    ids = tokens()
    inputs: dict[str, Any] = {"input_ids": ids}
    if image:
        ids[0, 10:14] = 110
        inputs["pixel_values"] = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        inputs["token_type_ids"] = (ids == 110).long()
    calls: list[LayerCall] = []
    with torch.no_grad(), configure(observer=calls.append):
        out, expected = stem(**inputs).logits, host(**inputs).logits
    torch.testing.assert_close(out, expected, atol=2e-4, rtol=1e-4)
    assert [call.reason for call in calls] == ["custom mask" if image else "prefill"] * 2


def test_a_config_is_saved_and_loaded_with_its_model(tmp_path: Path) -> None:
    config = StemConfig(dense_below=0, block_size=16, stride=4, sink_blocks=1, local_blocks=1, tail_blocks=0, min_blocks=2)
    model = build(transformers.LlamaConfig(**SMALL))
    set_config(model, config)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="stem")
    assert StemConfig.from_dict(loaded.config.stem_attention) == config
    calls: list[LayerCall] = []
    with torch.no_grad(), configure(observer=calls.append):
        first, second = model(tokens()).logits, loaded(tokens()).logits
        loaded.config.stem_attention = StemConfig(dense_below=200).to_dict()
        third = loaded(tokens()).logits
        set_config(loaded)
        assert torch.equal(loaded(tokens()).logits, third)
    assert torch.equal(first, second)
    assert [call.sparse for call in calls] == [True] * 4 + [False] * 4
    with pytest.raises(TypeError, match="set_config"):
        model.config.stem_attention["beta"] = 0.5


@pytest.mark.parametrize("stored", [{"bta": 0.2}, {"beta": -1.0}, "stem"], ids=["name", "value", "type"])
def test_a_bad_stored_config_is_named(stored: Any) -> None:
    model = build(transformers.LlamaConfig(**SMALL))
    model.config.stem_attention = stored
    with torch.no_grad(), pytest.raises(ValueError, match="expected"):
        model(tokens())


def test_a_reloaded_config_needs_set_config_before_compile() -> None:
    model = build(transformers.LlamaConfig(**SMALL))
    model.config.stem_attention = KEEP_ALL.to_dict()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad(), pytest.raises(Exception, match="set_config"):
        compiled(tokens())


def test_a_class_with_its_own_attention_is_refused_by_name() -> None:
    config = transformers.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=97, bos_token_id=1, eos_token_id=2)
    model = build(config)
    with pytest.raises(UnsupportedError, match="BloomForCausalLM keeps its own attention"):
        set_config(model, KEEP_ALL)
    with torch.no_grad(), pytest.raises(UnsupportedError, match="BloomModel keeps its own attention"):
        model(tokens())


def test_set_config_wants_a_model_on_stem_and_a_config() -> None:
    model = build(transformers.LlamaConfig(**SMALL), "sdpa")
    with pytest.raises(UnsupportedError, match='LlamaForCausalLM runs attn_implementation="sdpa"'):
        set_config(model, KEEP_ALL)
    model.set_attn_implementation("stem")
    set_config(model, KEEP_ALL)
    with pytest.raises(ValueError, match="config: expected"):
        set_config(model, KEEP_ALL.to_dict())


def test_register_again_changes_nothing() -> None:
    before = transformers.AttentionInterface()["stem"], transformers.AttentionMaskInterface()["stem"]
    register()
    assert before == (transformers.AttentionInterface()["stem"], transformers.AttentionMaskInterface()["stem"])
