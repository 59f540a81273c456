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

WRONG = (None, "word", -1, 0.5, [1])
GGUF = b"GGUF" + (3).to_bytes(4, "little") + (1).to_bytes(8, "little") * 2


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.write_text, (self.marker, "ran")


def change(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.fixture
def copy(tiny_llama, tmp_path):
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def refused(model, complaint):
    return complaint(main, ["run", "--model", str(model), "--context", "600"], 1)


@pytest.mark.parametrize("on_a_terminal", [False, True])
def test_code_that_comes_with_a_model_does_not_run_and_no_one_is_asked(on_a_terminal, copy, tmp_path, monkeypatch, complaint):
    if on_a_terminal:
        monkeypatch.setattr("builtins.input", lambda *_: "y")
    marker = tmp_path / "marker"
    (copy / "own.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).write_text('ran')\n")
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    change(copy / "config.json", auto_map=auto, model_type="own", architectures=["OwnModel"])
    tokenizer = {"auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}, "tokenizer_class": "OwnTokenizer"}
    change(copy / "tokenizer_config.json", **tokenizer)
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


def run(model, capsys, *more):
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
    ("field", "value"),
    [
        *[("rope_parameters", rope) for rope in ({"rope_type": "other", "rope_theta": 1e4}, {"rope_type": "yarn"})],
        *[("hidden_size", 48), ("num_key_value_heads", 3), ("intermediate_size", 33), ("vocab_size", 300)],
        ("num_hidden_layers", 3),
    ],
)
def test_a_config_that_does_not_go_with_the_weights(field, value, copy, capsys):
    change(copy / "config.json", **{field: value})
    code, _, line = run(copy, capsys)
    assert code == 1
    assert "--model: " in line
    assert "config.json means (" in line or field not in ("hidden_size", "num_key_value_heads")


@pytest.mark.parametrize("template", ["{% for", "{{ raise_exception('no') }}", "{{ messages[0]['x'].y.z }}", "{{ 1 / 0 }}"])
def test_a_chat_template_that_fails(template, copy, capsys, complaint):
    (copy / "chat_template.jinja").write_text(template)
    line = refused(copy, complaint)
    assert "chat template: expected" in line
    assert "--no-chat-template" in line
    assert run(copy, capsys, "--no-chat-template")[0] == 0


def test_a_tokenizer_larger_than_the_vocabulary_is_refused_and_a_smaller_one_is_usual(tmp_path, capsys, complaint):
    line = refused(save(toy("llama", vocab_size=40), tmp_path / "small"), complaint)
    assert "is none of the 40 that LlamaForCausalLM knows" in line
    assert run(save(toy("llama", vocab_size=VOCABULARY + 63), tmp_path / "large"), capsys)[0] == 0


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
