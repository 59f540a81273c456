"""Environments: terminals of any encoding and width, no extras, and what doctor says; and a command that starts fast."""

import errno
import io
import json
import os
import subprocess
import sys

import pytest
import torch
from tests.toys import without

import stem_attention
from stem_attention.cli import main

HEAVY = ("transformers", "triton", "matplotlib", "gguf", "accelerate", "safetensors", "tokenizers", "huggingface_hub")

# Finds none of them, runs command lines, and lists each one's exit code and what it printed.
BARE = f"""{without(HEAVY)}
import io, json
from contextlib import redirect_stderr, redirect_stdout
import stem_attention
from stem_attention.cli import main
done = []
for arguments in json.loads(sys.argv[1]):
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = main(arguments)
    done.append([code, out.getvalue(), err.getvalue()])
assert not set({HEAVY!r}) & {{name.partition(".")[0] for name in sys.modules}}
print(json.dumps(done))
"""

LISTED = f"""
import sys
import torch
before = set(sys.modules)
from stem_attention.cli import main
main(["--help"])
print(*sorted({{name.partition(".")[0] for name in set(sys.modules) - before}} & set({HEAVY!r})), file=sys.stderr)
"""


def python(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=False, timeout=240)


def test_base_dependencies_are_enough_for_help_and_doctor_and_for_saying_what_else_needs_more():
    works = [["--help"], ["-h"], [], ["run", "-h"], ["--version"], ["doctor"]]
    needs = [["run"], ["inspect"], ["calibrate", "--out", os.devnull], ["compile", "--arch", "sm90"]]
    done = python(BARE, json.dumps(works + needs))
    assert done.returncode == 0, done.stderr.decode()
    results = json.loads(done.stdout)
    for arguments, (code, out, err) in zip(works, results, strict=False):
        assert (code, err) == (0, ""), arguments
        assert out.strip(), arguments
    assert results[4][1].strip() == stem_attention.__version__
    assert "missing transformers (run, inspect and calibrate): pip install 'stem-attention[transformers]'" in results[5][1]
    for arguments, (code, out, err) in zip(needs, results[len(works) :], strict=True):
        assert (code, out) == (1, ""), arguments
        (line,) = err.splitlines()
        assert "is not installed; run: pip install 'stem-attention[" in line


def test_help_loads_nothing_heavy():
    """Torch itself is most of the time that remains."""
    done = python(LISTED)
    assert (done.returncode, done.stderr.decode().strip()) == (0, "")


@pytest.fixture(scope="module")
def french(tiny_llama, tmp_path_factory):
    """A short run whose answer, of random bytes, few terminals can show; its prompt has a byte order mark."""
    prompt = tmp_path_factory.mktemp("prompt") / "prompt.txt"
    prompt.write_text("Où est l'été ? " * 40, encoding="utf-8-sig")
    return ["--model", str(tiny_llama), "--prompt-file", str(prompt)]


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii", "utf-8"])
def test_terminals_of_any_encoding(encoding, french, monkeypatch):
    """As Python opens standard output under ``PYTHONUTF8=0``."""
    pytest.importorskip("transformers")

    def shown(*arguments):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        code = main([*arguments])
        for stream in streams:
            stream.flush()
        out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)  # type: ignore[attr-defined]
        assert code == 0, err
        return out

    assert "time to first token" in shown("run", *french, "--dense-below", "0")
    picture = shown("inspect", *french).splitlines()[1:6]
    assert "?" not in "".join(picture), "blocks are drawn with what the terminal has"
    assert any(line.strip() for line in picture)
    assert json.loads(shown("run", *french, "--json"))["prompt_tokens"] == 40 * len("Où est l'été ? ".encode())


def test_a_full_disk_is_one_line(monkeypatch, capsys):
    def full(report):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("stem_attention.cli.doctor.print_json", full)
    assert main(["doctor", "--json"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("stem-attention: ")
    assert "No space left on device; look after" in line


def test_a_closed_standard_error_leaves_json_alone(tiny_llama, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["inspect", "--model", str(tiny_llama), "--context", "600", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] <= 600


@pytest.mark.parametrize("columns", [None, "60", "200"])
def test_what_is_piped_is_as_wide_as_columns_says(columns, monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    assert main(["doctor"]) == 0
    tables = [line for line in capsys.readouterr().out.splitlines() if line[0] in "│┃┏┡└┗╇"]
    assert tables
    assert max(map(len, tables)) <= int(columns or 80)


def test_doctor_names_versions_and_explains_each_dtype_and_head_dim(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(part in out for part in (torch.__version__, "cpu:", "bfloat16"))
    assert main(["doctor", "--json"]) == 0
    cpu = [entry for entry in json.loads(capsys.readouterr().out)["backends"] if entry["device"] == "cpu"]
    assert {(entry["dtype"], entry["head_dim"]) for entry in cpu} >= {("float32", 64), ("bfloat16", 128)}
    assert all(entry["backend"] in entry["reasons"] and isinstance(entry["dense_below"], int) for entry in cpu)
