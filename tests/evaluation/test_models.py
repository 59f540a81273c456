"""Finding models; loading is tested through the command."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stem_attention.evaluation.embedded import embedded_gguf
from stem_attention.evaluation.models import ModelSource, context_length, find_model


def test_gguf_file_splits_into_directory_and_name(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert find_model(str(file)) == ModelSource(str(tmp_path), "model.gguf")
    assert str(find_model(str(file))) == str(file)


def test_directory_with_a_config_comes_before_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert find_model(str(tmp_path)) == ModelSource(str(tmp_path), "model.gguf")
    (tmp_path / "config.json").write_text("{}")
    assert find_model(str(tmp_path)) == ModelSource(str(tmp_path))


def test_directory_with_two_gguf_files_is_ambiguous(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="2 GGUF files"):
        find_model(str(tmp_path))


def test_hub_id_is_passed_on_and_a_wrong_path_is_not() -> None:
    assert find_model("some-org/some-model") == ModelSource("some-org/some-model")
    with pytest.raises(ValueError, match="check the path"):
        find_model("./some/where/else")


@pytest.mark.skipif(embedded_gguf() is None, reason="the embedded model is not installed")
def test_embedded_model_is_the_default() -> None:
    source = find_model()
    assert source.gguf is not None
    assert (Path(source.location) / source.gguf).stat().st_size > 50_000_000


def test_context_length_is_that_of_the_config() -> None:
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=77
    )
    with torch.device("meta"):
        assert context_length(LlamaForCausalLM(config)) == 77
