"""A model's files are data: no code that comes with them runs, and whatever is wrong with them is one line, no traceback."""

import json
import pickle
import shutil
import time
from pathlib import Path

import pytest
import torch
from tests.toys import VOCABULARY, save, toy

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


WRONG = (None, "word", -1, 0.5, [1])
GGUF = b"GGUF" + (3).to_bytes(4, "little") + (1).to_bytes(8, "little") * 2


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


def refused(model, complaint):
    return complaint(main, ["run", "--model", str(model), "--context", "600"], 1)


@pytest.mark.parametrize("on_a_terminal", [False, True])
def test_code_that_comes_with_a_model_does_not_run_and_no_one_is_asked(on_a_terminal, copy, tmp_path, monkeypatch, complaint):
    if on_a_terminal:
        monkeypatch.setattr("builtins.input", lambda *_: "y")
    marker = tmp_path / "marker"
    (copy / "own.py").write_text(CODE.format(marker=str(marker)))
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    change(copy / "config.json", auto_map=auto, model_type="own", architectures=["OwnModel"])
    change(
        copy / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]}, tokenizer_class="OwnTokenizer"
    )
    assert "transformers can load" in refused(copy, complaint)
    assert not marker.exists()


def test_a_pickle_among_the_weights_does_not_run(copy, tmp_path, complaint):
    marker = tmp_path / "marker"
    (copy / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Bomb(marker)}, copy / "pytorch_model.bin")
    assert "transformers can load" in refused(copy, complaint)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists(), "the bomb itself works"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *[("model.safetensors", head) for head in (b"", b"\xff" * 64, b"\x10\x27" + bytes(6) + b"{}", b"\xff" * 7 + b"\x7f{}")],
        *[("config.json", text) for text in (b"", b"{", b"[]", b"[" * 100_000, b'{"model_type": 3}')],
        # A GGUF header: magic, version 3, one tensor, one key; then a key whose string claims 2^62 bytes.
        *[("x.gguf", GGUF + tail) for tail in (b"", b"\xff" * 8, (1 << 62).to_bytes(8, "little") + b"x" * 32, bytes(200))],
    ],
)
def test_broken_files_are_refused(file, content, copy, complaint):
    (copy / file).write_bytes(content)
    assert "transformers can load" in refused(copy / file if file == "x.gguf" else copy, complaint)


@pytest.mark.parametrize(
    "stored",
    [
        3, [1], {"colour": 1}, {"policy": "nothing"}, {"policy": {"policy": "stem", "beta": "x"}}, {"dense_below": -1},
        {"policy": {"policy": "stem", "beta": 10**400}}, {"policy": {"policy": "mass", "head_factors": [[1.0]] * 3}},
        {"policy": {"policy": [["deep"]]}}, {"dense_layers": None},
    ],
)  # fmt: skip
def test_bad_settings_in_a_model_are_refused(stored, copy, complaint):
    change(copy / "config.json", stem_attention=stored)
    line = refused(copy, complaint)
    assert "holds bad stem_attention settings" in line
    assert "expected" in line


@pytest.mark.parametrize("content", ["[" * 100_000, '{"policy": "stem", "beta": 1' + "0" * 5000 + "}"])
def test_hostile_policy_files_are_refused(content, tmp_path, complaint):
    (tmp_path / "policy.json").write_text(content)
    line = complaint(main, ["run", "--policy", str(tmp_path / "policy.json")], 2)
    assert line.startswith("stem-attention: --policy: ")


def run(model: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str, str]:
    """Exit code, stdout, and the last line of stderr; an exception that escapes fails the test."""
    prompt = model.parent / "prompt.txt"
    prompt.write_text("What is the number? " * 4)
    code = main(["run", "--model", str(model), "--prompt-file", str(prompt), "--max-new-tokens", "2", "--json", *more])
    captured = capsys.readouterr()
    return code, captured.out, captured.err.splitlines()[-1] if captured.err else ""


@pytest.mark.parametrize("part", range(4))
def test_every_field_of_a_config_wrong_in_five_ways(part, copy, capsys):
    file = copy / "config.json"
    right = json.loads(file.read_text())
    for field in sorted(right)[part::4]:
        for wrong in WRONG:
            file.write_text(json.dumps({**right, field: wrong}))
            code, out, line = run(copy, capsys)  # some are as good as what was there
            assert code in (0, 1), (field, wrong)
            if code:
                assert line.startswith("stem-attention: "), (field, wrong)
                assert out == ""
            else:
                json.loads(out)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "other", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "yarn"}},
        {"hidden_size": 48},
        {"num_key_value_heads": 3},
        {"intermediate_size": 33},
        {"vocab_size": 300},
        {"num_hidden_layers": 3},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_config_that_does_not_go_with_the_weights(changes, copy, capsys):
    change(copy / "config.json", **changes)
    code, _, line = run(copy, capsys)
    assert code == 1
    assert "--model: " in line
    if "hidden_size" in changes or "num_key_value_heads" in changes:
        assert "config.json means (" in line


@pytest.mark.parametrize("template", ["{% for", "{{ raise_exception('no') }}", "{{ messages[0]['x'].y.z }}", "{{ 1 / 0 }}"])
def test_a_chat_template_that_fails(template, copy, capsys, complaint):
    (copy / "chat_template.jinja").write_text(template)
    line = refused(copy, complaint)
    assert "chat template: expected" in line
    assert "--no-chat-template" in line
    assert run(copy, capsys, "--no-chat-template")[0] == 0


def test_a_tokenizer_larger_than_the_vocabulary(tmp_path, complaint):
    model = save(toy("llama", vocab_size=40), tmp_path / "model")
    line = refused(model, complaint)
    assert "is none of the 40 that LlamaForCausalLM knows" in line


@pytest.mark.parametrize("offline", ["variable", "network"])
def test_a_hub_id_while_offline(offline, monkeypatch, complaint):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline == "variable")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    start = time.monotonic()
    line = complaint(main, ["run", "--model", "some-org/no-such-model"], 1)
    assert time.monotonic() - start < 20
    assert "offline" in line
    assert "some-org/no-such-model" in line


def test_an_embedding_larger_than_the_tokenizer_is_usual(tmp_path, capsys):
    model = save(toy("llama", vocab_size=VOCABULARY + 63), tmp_path / "model")
    assert run(model, capsys)[0] == 0
