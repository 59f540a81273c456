"""Finding models; loading is tested through the command."""

import importlib.metadata
from pathlib import Path

import pytest

from stem_attention.models.load import EMBEDDED_INSTALL, ModelSource, context_length, embedded_gguf, find_model


def test_gguf_file_splits_into_directory_and_name(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert find_model(str(file)) == ModelSource(str(tmp_path), "model.gguf")
    assert str(find_model(str(file))) == str(file)


def test_directory_with_a_config_comes_before_a_gguf_file(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert find_model(str(tmp_path)) == ModelSource(str(tmp_path), "model.gguf")
    (tmp_path / "config.json").write_text("{}")
    assert find_model(str(tmp_path)) == ModelSource(str(tmp_path))
    (tmp_path / "config.json").unlink()
    (tmp_path / "another.gguf").touch()
    with pytest.raises(ValueError, match="2 GGUF files"):
        find_model(str(tmp_path))


def test_hub_id_is_passed_on_and_a_wrong_path_is_not():
    assert find_model("some-org/some-model") == ModelSource("some-org/some-model")
    with pytest.raises(ValueError, match="check the path"):
        find_model("./some/where/else")


def test_a_shard_is_no_model(tmp_path):
    for part in (1, 2):
        (tmp_path / f"m-0000{part}-of-00002.gguf").write_bytes(b"GGUF")
    for name in (tmp_path, tmp_path / "m-00002-of-00002.gguf"):
        with pytest.raises(ValueError, match="model: expected one GGUF file with the whole model, .* --merge"):
            find_model(str(name))


def test_without_the_package_of_the_embedded_model_it_says_how_to_install_it(monkeypatch):
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    assert embedded_gguf() is None
    with pytest.raises(ValueError, match=f"model: expected the embedded .*{EMBEDDED_INSTALL}"):
        find_model()


@pytest.mark.skipif(embedded_gguf() is None, reason="the embedded model is not installed")
def test_embedded_model_is_the_default():
    source = find_model()
    assert source.gguf is not None
    assert (Path(source.location) / source.gguf).stat().st_size > 50_000_000


def test_context_length_is_that_of_the_config(model):
    assert context_length(model) == 4096
