"""Every mistake of the user ends as one line on stderr that names it; nothing on stdout, no traceback."""

import json
import subprocess
import sys

import pytest
from tests.toys import save, toy, without

from stem_attention.cli import main

pytest.importorskip("transformers")

OUT_OF_RANGE = ["--policy dense@0.2", "--dtype int8", "--max-new-tokens 0", "--context 0", "--depth 2", "--dense-below -1"]
OUT_OF_RANGE += ["--seed x"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prompt-file", "absent.txt"], "--prompt-file: cannot read absent.txt"),
        (["--prompt-file", "empty.txt"], "--prompt-file: empty.txt is empty"),
        (["--prompt-file", "binary.txt"], "--prompt-file: binary.txt is not UTF-8"),
        (["--policy", "mss"], "got 'mss'; did you mean mass?"),
        (["--policy", "stem:dcay=0.5"], "'dcay'; did you mean decay?"),
        (["--policy", "absent.json"], "--policy: expected a readable JSON file"),
        (["--policy", "deep.json"], "--policy: expected a readable JSON file"),
        (["--policy", "huge.json"], "--policy: "),
        (["--device", "toaster"], "--device: expected"),
        (["--device", "cdua"], "did you mean cuda?"),
        (["--dtype", "bfloat"], "did you mean bfloat16?"),
        (["--dtype", "Bfloat16"], "did you mean bfloat16?"),
        (["--device", "CPU"], "did you mean cpu?"),
        (["--prompt-fil", "a.txt"], "--prompt-file"),
        (["--device", "cuda:99"], "--device: cuda:99 is not there"),
        (["--plot", "picture.jpg"], "--plot: expected a file that ends in .png"),
        (["--plot", "absent/picture.png"], "--plot: cannot write absent/picture.png"),
        (["--max-new-tokens"], "--max-new-tokens"),
        (["--prest", "paper"], "--prest"),
        *[(text.split(), f"{text.split()[0]}: ") for text in OUT_OF_RANGE],
    ],
)
def test_bad_option_of_run(arguments, says, tmp_path, monkeypatch, complaint):
    monkeypatch.chdir(tmp_path)
    huge = '{"policy": "stem", "beta": 1' + "0" * 5000 + "}"
    files = {"empty.txt": " \n", "deep.json": "[" * 100_000, "huge.json": huge}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    line = complaint(main, ["run", *arguments], 2)
    assert says in line
    assert "see `stem-attention" in line
    assert line.endswith("--help`")


@pytest.mark.parametrize("arguments", [["--bogus"], ["dance"], ["calibrate", "--model", "."]])
def test_command_line_that_does_not_parse_exits_2(arguments, complaint):
    assert "--help" in complaint(main, arguments, 2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "--policy", "heads.json"], ["--policy: head_factors: expected 2 x 4", "got 30 x 4"]),
        (["run", "--context", "600", "--policy", "uniform@0.01"], ["--policy: uniform@0.01: no density within 5%"]),
        (["run", "--prompt-file", "long.txt"], ["prompt of 5000 tokens", "context of 4096 tokens"]),
        (["run", "--context", "20"], ["--context: expected at least"]),
        (["run", "--context", "600", "--max-new-tokens", "9000"], ["9000", "4096", "lower --context or --max-new-tokens"]),
        (["run", "--max-new-tokens", "9000"], ["that --max-new-tokens leaves to the prompt: expected at least"]),
        (["inspect", "--context", "9000"], ["9000", "4096"]),
        (["inspect", "--layer", "2"], ["--layer: expected 0 to"]),
        (["inspect", "--layer", "-1"], ["--layer: expected 0 to"]),
        (["inspect", "--head", "4"], ["--head: expected 0 to"]),
    ],
)
def test_what_does_not_go_with_the_model(arguments, says, tiny_llama, tmp_path, monkeypatch, complaint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "long.txt").write_text("x" * 5000)
    (tmp_path / "heads.json").write_text(json.dumps({"policy": "mass", "head_factors": [[1.0] * 4] * 30}))
    line = complaint(main, [*arguments, "--model", str(tiny_llama)], 1)
    assert all(part in line for part in says), line


@pytest.mark.parametrize("kind", ["bloom", "mamba"])
def test_model_class_with_attention_of_its_own_or_none(kind, tmp_path, complaint):
    model = save(toy(kind, **({"n_layer": 1, "n_head": 2} if kind == "bloom" else {})), tmp_path)
    line = complaint(main, ["run", "--model", str(model), "--context", "600"], 1)
    assert f"{kind.capitalize()}ForCausalLM" in line
    assert "attention" in line


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("./absent", "--model: expected a directory, a GGUF file or a hub id"),
        (".", "0 GGUF files and no config.json"),
        ("model.bin", "expected a GGUF file"),
    ],
)
def test_what_is_no_model(name, says, tmp_path, monkeypatch, complaint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"not a model")
    assert says in complaint(main, ["run", "--model", name], 1)


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("transformers", ["run"]),
        *[(package, ["inspect", "--model", "model.gguf"]) for package in ("gguf", "accelerate")],
        ("matplotlib", ["run", "--plot", "picture.png"]),
    ],
)
def test_missing_package_names_the_install_command(package, command, tmp_path, monkeypatch, complaint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").touch()
    monkeypatch.setitem(sys.modules, package, None)
    line = complaint(main, command, 1)
    assert package in line
    assert "pip install 'stem-attention[" in line


def test_a_folder_of_safetensors_needs_no_package_for_gguf(tiny_llama):
    asked = ["inspect", "--model", str(tiny_llama), "--context", "600", "--json"]
    code = f"{without(('gguf', 'accelerate'))}\nfrom stem_attention.cli import main\nsys.exit(main({asked!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
