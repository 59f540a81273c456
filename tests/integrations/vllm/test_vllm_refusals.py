"""What Stem cannot do is refused when the engine starts, by name, and never turned into a wrong token."""

from __future__ import annotations

from shutil import copy

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from stem_attention import UnsupportedError
from stem_attention.integrations import vllm as plugin
from stem_attention.integrations.serving.settings import ENVIRONMENT
from stem_attention.integrations.vllm import layers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "stem:decay=2"}, "--additional-config stem_attention: decay: expected"),
        ({"backend": "cuda"}, "backend: expected one of auto"),
    ],
    ids=["value", "backend"],
)
def test_bad_settings_are_refused_before_weights_are_read(settings, message, llama, engine, tmp_path):
    """Those take minutes; here there are none."""
    copy(llama / "config.json", tmp_path)
    with pytest.raises(ValueError, match=message):
        engine(tmp_path, settings)


def test_a_bad_environment_stops_vllm_before_anything_is_loaded(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "stem:decay=2")
    with pytest.raises(ValueError, match="^STEM_ATTENTION_SETTINGS: decay: expected"):
        plugin.register()


def test_two_places_that_speak(llama, engine, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "paper")
    with pytest.raises(ValueError, match="keep one of the two"):
        engine(llama, {})


def test_a_backend_that_cannot_run_here_says_why(llama, engine):
    with pytest.raises(UnsupportedError, match="triton: cannot run: "):
        engine(llama, {"backend": "triton"})


def test_a_quantised_cache(llama, engine):
    with pytest.raises(UnsupportedError, match=r"none of this model's 2 attention layers: 2 x KV cache of fp8 under"):
        engine(llama, {}, kv_cache_dtype="fp8", dtype="bfloat16")


def test_a_model_of_sliding_windows_alone(models, engine):
    with pytest.raises(UnsupportedError, match="none of this model's 2 attention layers: 2 x sliding window"):
        engine(models("MistralConfig", sliding_window=128), {})


def test_a_vllm_whose_metadata_lacks_what_is_needed(llama, engine, monkeypatch):
    monkeypatch.setattr(layers, "fields", lambda cls: [])
    with pytest.raises(UnsupportedError, match=r"does not know this vLLM \(.*\): its attention metadata has no is_prefilling"):
        engine(llama, {})
