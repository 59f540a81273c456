"""A model's files are data: no code that comes with them runs, and the refusal is one line."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from stem_attention.cli import main

pytest.importorskip("transformers")

CODE = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.write_text, (self.marker, "ran")


def change(file: Path, **fields: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def refused(model: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["run", "--model", str(model), "--context", "600"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err.splitlines()[-1]


@pytest.mark.parametrize("on_a_terminal", [False, True])
def test_code_that_comes_with_a_model_does_not_run_and_no_one_is_asked(
    on_a_terminal: bool, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if on_a_terminal:
        monkeypatch.setattr("builtins.input", lambda *_: "y")
    marker = tmp_path / "marker"
    (copy / "own.py").write_text(CODE.format(marker=str(marker)))
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    change(copy / "config.json", auto_map=auto, model_type="own", architectures=["OwnModel"])
    change(
        copy / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]}, tokenizer_class="OwnTokenizer"
    )
    assert "transformers can load" in refused(copy, capsys)
    assert not marker.exists()


def test_a_pickle_among_the_weights_does_not_run(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "marker"
    (copy / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Bomb(marker)}, copy / "pytorch_model.bin")
    assert "transformers can load" in refused(copy, capsys)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists(), "the bomb itself works"


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x10\x27\x00\x00\x00\x00\x00\x00{}", b"\xff" * 7 + b"\x7f{}"])
def test_broken_safetensors_are_refused(content: bytes, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "model.safetensors").write_bytes(content)
    assert "transformers can load" in refused(copy, capsys)


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, '{"model_type": 3}'])
def test_broken_configs_are_refused(content: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "config.json").write_text(content)
    assert "transformers can load" in refused(copy, capsys)


@pytest.mark.parametrize(
    "stored", ["paper", {"beta": "x"}, {"colour": 1}, [1], {"block_size": 0}, {"beta": 10**400}, {"beta": [["deep"]]}]
)
def test_a_bad_stem_config_in_a_model_is_refused(stored: object, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(copy / "config.json", stem_attention=stored)
    assert "expected" in refused(copy, capsys)


# A GGUF header: magic, version 3, one tensor, one key; then a key whose string claims 2^62 bytes.
@pytest.mark.parametrize("tail", [b"", b"\xff" * 8, (1 << 62).to_bytes(8, "little") + b"x" * 32, b"\x00" * 200])
def test_broken_gguf_files_are_refused(tail: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + (1).to_bytes(8, "little") * 2 + tail)
    assert "transformers can load" in refused(file, capsys)


def test_out_writes_into_no_directory_that_something_else_made(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, text = tmp_path / "mine", tmp_path / "text.txt"
    out.mkdir()
    (out / "records.jsonl").write_text("my own\n")
    text.write_text("A long text about nothing. " * 100)
    arguments = ["eval", "perplexity", "--model", str(tiny_llama), "--text", str(text), "--lengths", "400", "--windows", "1"]
    assert main([*arguments, "--out", str(out)]) == 1
    assert "run.json" in capsys.readouterr().err
    assert {file.name: file.read_text() for file in out.iterdir()} == {"records.jsonl": "my own\n"}
    assert main([*arguments, "--out", str(text)]) == 1
    assert "--out: cannot write" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[" * 100_000, '{"beta": 1' + "0" * 5000 + "}"])
def test_hostile_config_files_are_refused(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(content)
    assert main(["bench", "--config", str(tmp_path / "config.json")]) == 1
    assert capsys.readouterr().err.startswith("stem-attention: ")
