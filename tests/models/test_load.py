"""Finding models; loading is tested through the command."""

import pytest

from stem_attention.models import load
from stem_attention.models.load import EMBEDDED_INSTALL, ModelSource, embedded_gguf, find_model


def test_directory_with_a_config_comes_before_a_gguf_file(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    for named in (tmp_path, file):
        assert find_model(str(named)) == ModelSource(str(tmp_path), "model.gguf")
        assert str(find_model(str(named))) == str(file)
    (tmp_path / "config.json").write_text("{}")
    assert find_model(str(tmp_path)) == ModelSource(str(tmp_path))
    (tmp_path / "config.json").unlink()
    (tmp_path / "another.gguf").touch()
    with pytest.raises(ValueError, match="2 GGUF files"):
        find_model(str(tmp_path))


def test_a_shard_is_no_model(tmp_path):
    for part in (1, 2):
        (tmp_path / f"m-0000{part}-of-00002.gguf").write_bytes(b"GGUF")
    for name in (tmp_path, tmp_path / "m-00002-of-00002.gguf"):
        with pytest.raises(ValueError, match="model: expected one GGUF file with the whole model, .* --merge"):
            find_model(str(name))


def test_without_the_package_of_the_embedded_model_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(load, "EMBEDDED_PACKAGE", "no-such-package")
    assert embedded_gguf() is None
    with pytest.raises(ValueError, match=f"model: expected the embedded .*{EMBEDDED_INSTALL}"):
        find_model()
