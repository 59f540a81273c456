"""What Stem cannot do is refused when the engine starts, by name, and never turned into a wrong token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from stem_attention import UnsupportedError
from stem_attention.integrations import vllm as plugin
from stem_attention.integrations import vllm_host, vllm_runner
from stem_attention.integrations.serving_settings import ENVIRONMENT


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": 2}, "--additional-config stem_attention: decay: expected"),
        ({"backend": "cuda"}, "backend: expected one of auto"),
    ],
    ids=["value", "backend"],
)
def test_bad_settings(settings: Any, message: str, llama: Path, engine: Any) -> None:
    with pytest.raises(ValueError, match=message):
        engine(llama, settings)


def test_a_bad_environment_stops_vllm_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, '{"decay": 2}')
    with pytest.raises(ValueError, match="^STEM_ATTENTION_CONFIG: decay: expected"):
        plugin.register()


def test_two_places_that_speak(llama: Path, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "{}")
    with pytest.raises(ValueError, match="keep one of the two"):
        engine(llama, {})


def test_a_backend_that_cannot_run_here_says_why(llama: Path, engine: Any) -> None:
    with pytest.raises(UnsupportedError, match="triton: cannot run: "):
        engine(llama, {"backend": "triton"})


def test_a_quantised_cache(llama: Path, engine: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"none of this model's 2 attention layers: 2 x KV cache of torch\.\w+ under"):
        engine(llama, {}, kv_cache_dtype="fp8", dtype="bfloat16")


def test_a_model_of_sliding_windows_alone(models: Callable[..., Path], engine: Any) -> None:
    with pytest.raises(UnsupportedError, match="none of this model's 2 attention layers: 2 x sliding window"):
        engine(models("MistralConfig", sliding_window=128), {})


def test_an_unknown_vllm(llama: Path, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    monkeypatch.setattr(vllm_host, "watch_runners", lambda: None)

    announced = GPUModelRunner.initialize_kv_cache
    monkeypatch.setattr(GPUModelRunner, "initialize_kv_cache", getattr(announced, "__wrapped__", announced))
    with pytest.raises(UnsupportedError, match=r"does not know this vLLM \(.*\): the model runner did not announce itself"):
        engine(llama, {})


def test_metadata_without_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_runner, "_metadata_fields", lambda: {"seq_lens"})
    with pytest.raises(UnsupportedError, match="its attention metadata has no is_prefilling and no seq_lens_cpu_upper_bound"):
        vllm_runner.watch_runners()
