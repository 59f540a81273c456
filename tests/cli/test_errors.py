"""Every mistake of the user ends as one line on stderr that names it; nothing on stdout, no traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

from stem_attention.cli import main


def complaint(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 1) -> str:
    """Run, and return the one line."""
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("stem-attention: ")]
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prompt-file", "absent.txt"], "--prompt-file: cannot read absent.txt"),
        (["--policy", "magic"], "got 'magic'"),
        (["--preset", "magic"], "--preset: expected one of default, paper, angelslim"),
        (["--config", "absent.json"], "--config: cannot read absent.json"),
        (["--set", "beta"], "--set: expected FIELD=VALUE"),
        (["--set", "beta=-1"], "beta: expected a finite number >= 0"),
        (["--set", "colour=3"], "got colour"),
        (["--policy", "sink-window", "--set", "colour=3"], "got colour"),
        (["--device", "toaster"], "--device: expected"),
        (["--device", "cuda:99"], "--device: cuda:99 is not there"),
        (["--dtype", "int8"], "--dtype: expected"),
        (["--max-new-tokens", "0"], "--max-new-tokens: expected an integer >= 1"),
        (["--context", "0"], "--context: expected an integer >= 1"),
        (["--depth", "2"], "--depth: expected a number from 0 to 1"),
        (["--plot", "picture.jpg"], "--plot: expected a file that ends in .png"),
        (["--plot", "absent/picture.png"], "--plot: cannot write absent/picture.png"),
        (["--model", "./absent"], "--model: expected a directory, a GGUF file or a hub id"),
        (["--model", "."], "0 GGUF files and no config.json"),
    ],
)
def test_bad_option_of_run(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in complaint(["run", *arguments], capsys)


@pytest.mark.parametrize("command", ["run", "inspect"])
def test_empty_prompt(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompt.txt").write_text(" \n")
    assert "is empty" in complaint([command, "--prompt-file", str(tmp_path / "prompt.txt")], capsys)


def test_binary_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompt.bin").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8" in complaint(["run", "--prompt-file", str(tmp_path / "prompt.bin")], capsys)


@pytest.mark.parametrize(("content", "says"), [("{", "is not JSON"), ("[1]", "holds a list"), ('{"colour": 1}', "got colour")])
def test_bad_config_file(content: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(content)
    assert says in complaint(["run", "--config", str(tmp_path / "config.json")], capsys)


def test_prompt_longer_than_the_context_says_both_numbers(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompt.txt").write_text("x" * 5000)
    line = complaint(["run", "--model", str(tiny_llama), "--prompt-file", str(tmp_path / "prompt.txt")], capsys)
    assert "prompt of 5000 tokens" in line
    assert "context of 4096 tokens" in line


def test_context_longer_than_the_models_says_both_numbers(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(["inspect", "--model", str(tiny_llama), "--context", "9000"], capsys)
    assert "9000" in line
    assert "4096" in line


def test_context_too_short_for_the_question(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "for the question alone" in complaint(["run", "--model", str(tiny_llama), "--context", "20"], capsys)


@pytest.mark.parametrize(("option", "value"), [("--layer", "2"), ("--layer", "-1"), ("--head", "4")])
def test_layer_or_head_that_is_not_there(option: str, value: str, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{option}: expected 0 to" in complaint(["inspect", "--model", str(tiny_llama), option, value], capsys)


def test_inspecting_a_prompt_that_runs_dense(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(["inspect", "--model", str(tiny_llama), "--context", "1000"], capsys)
    assert "short prompt" in line
    assert "--set dense_below=0" in line


def test_model_class_that_cannot_take_the_attention_function(tiny_bloom: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(["run", "--model", str(tiny_bloom), "--context", "600"], capsys)
    assert "Bloom" in line


def test_model_file_of_another_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    assert "expected a GGUF file" in complaint(["run", "--model", str(tmp_path / "model.bin")], capsys)


def test_broken_gguf_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.gguf").write_bytes(b"not a model")
    assert "transformers can load" in complaint(["run", "--model", str(tmp_path / "model.gguf")], capsys)


@pytest.mark.parametrize(("package", "command"), [("transformers", ["run"]), ("matplotlib", ["run", "--plot", "picture.png"])])
def test_missing_package_names_the_install_command(
    package: str, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    line = complaint(command, capsys)
    assert package in line
    assert "pip install 'stem-attention[" in line


@pytest.mark.parametrize("arguments", [["--bogus"], ["run", "--seed", "x"], ["dance"], ["run", "--max-new-tokens"]])
def test_command_line_that_does_not_parse_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "--help" in complaint(arguments, capsys, code=2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--lengths", "12x"], "--lengths: expected"),
        (["--lengths", "0"], "--lengths: expected"),
        (["--heads", "6", "--kv-heads", "4"], "--kv-heads: expected a divisor"),
        (["--repeats", "0"], "--repeats: expected"),
        (["--threads", "0"], "--threads: expected"),
        (["--set", "stride=7"], "block_size: expected a multiple of stride=7"),
    ],
)
def test_bad_option_of_bench(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in complaint(["bench", *arguments], capsys)


def test_interrupt_exits_130_without_a_traceback() -> None:
    # Interrupted by its own first step and not by a clock: an import that a signal reaches may swallow it.
    program = """
import os, signal, sys
from stem_attention.cli import main
from stem_attention.evaluation import bench_timing
bench_timing._wait = lambda device: os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
sys.exit(main(["bench", "--lengths", "2048", "--repeats", "100000"]))
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == 130
    assert finished.stdout == ""
    assert "Traceback" not in finished.stderr
