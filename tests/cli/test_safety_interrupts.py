"""Ctrl-C and kill -9 on the real command: what is on disk is whole, and the same command goes on from there."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stem_attention.cli import main

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")

CONTENDERS = ["--policy", "stem:block_size=32,dense_below=0", "--policy", "sink-window:block_size=32,window_blocks=3"]
RECORDS = 6 * 3
MEASURED = ("measure", "case", "tokens", "contender", "kl", "top1", "density", "nll")


# What a shell starts in the background ignores Ctrl-C, and so would these tests and the command in them.
LISTENING = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from stem_attention.cli import main
sys.exit(main(sys.argv[1:]))
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", LISTENING, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def wait_for(condition, process, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def lines(out: Path) -> list[bytes]:
    file = out / "records.jsonl"
    return file.read_bytes().splitlines(keepends=True) if file.exists() else []


def evaluation(model: Path, out: Path) -> list[str]:
    text = out.parent / "text.txt"
    text.write_text("A long text about nothing at all. " * 150)
    return ["eval", "perplexity", "--model", str(model), "--text", str(text), "--windows", "6", "--lengths", "800",
            *CONTENDERS, "--out", str(out)]  # fmt: skip


def results(out: Path) -> list[dict]:
    records = [json.loads(line) for line in lines(out)]
    return [{name: record[name] for name in MEASURED if name in record} for record in records]


@pytest.fixture(scope="module")
def whole(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The records of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(evaluation(tiny_llama, out)) == 0
    assert len(results(out)) == RECORDS
    return results(out)


@pytest.mark.parametrize("kind", ["SIGINT", "SIGKILL"])
def test_a_stopped_eval_keeps_whole_records_and_goes_on(
    kind: str, whole: list[dict], tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    process = start(*evaluation(tiny_llama, out))
    wait_for(lambda: len(lines(out)) >= 2, process)
    process.send_signal(signal.Signals[kind])
    code, printed, err = finish(process)
    assert code == {"SIGINT": 130, "SIGKILL": -signal.SIGKILL}[kind]
    assert printed == ""
    assert "Traceback" not in err
    kept = lines(out)
    assert 2 <= len(kept) < RECORDS
    assert json.loads((out / "run.json").read_text())["format"] == 1
    if kind == "SIGINT":
        assert err.splitlines()[-1] == "stem-attention: interrupted"
        assert all(line.endswith(b"\n") for line in kept)
        assert "| text.txt | 800 | dense |" in (out / "report.md").read_text()
    found = [json.loads(line) for line in kept if line.endswith(b"\n")]
    assert [{name: record[name] for name in MEASURED if name in record} for record in found] == whole[: len(found)]

    assert main(evaluation(tiny_llama, out)) == 0
    assert f"{len(found)} of {RECORDS} records are there already" in " ".join(capsys.readouterr().err.split())
    assert results(out) == whole
    assert [json.loads(line) for line in lines(out)][: len(found)] == found  # as they were, times included
    assert len(json.loads((out / "run.json").read_text())["sessions"]) == 2


def test_an_interrupted_run_prints_no_half_report_and_leaves_no_picture(tiny_llama: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    process = start(
        "run", "--model", str(tiny_llama), "--context", "1700", "--max-new-tokens", "200", "--set", "dense_below=0",
        "--set", "block_size=32", "--json", "--plot", str(picture),
    )  # fmt: skip
    assert process.stderr is not None
    assert any("dense: prefill" in line for line in process.stderr)  # its bar is drawn when that reading is over
    process.send_signal(signal.SIGINT)
    code, printed, err = finish(process)
    assert code == 130, err
    assert printed == ""
    assert err.splitlines()[-1] == "stem-attention: interrupted"
    assert "Traceback" not in err
    assert not picture.exists()
