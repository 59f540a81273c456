"""compile: what one process compiled, no other compiles again, whatever the prompt's length."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stem_attention.cli import main

pytest.importorskip("triton")

SMALL = ["--arch", "sm80", "--heads", "4", "--kv-heads", "2", "--head-dim", "32", "--set", "block_size=64"]


def compile_in_a_new_process(lengths: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "stem_attention.cli", "compile", *SMALL, "--lengths", lengths, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kernels: list[dict[str, Any]] = json.loads(done.stdout)["kernels"]
    return kernels


def test_another_process_finds_everything_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert main(["compile", *SMALL, "--lengths", "5000"]) == 0
    out = capsys.readouterr().out
    assert f"5 kernels of backend triton for sm80 lie in {tmp_path}, 5 of them new." in " ".join(out.split())
    files = sorted(tmp_path.rglob("*.cubin"))
    assert len(files) == 5
    # 6016 is a multiple of 16, 5001 is not, 4097 ends one token into a block: none gets a kernel of its own.
    again = compile_in_a_new_process("5001,6016,4097")
    assert {kernel["kernel"] for kernel in again} == {
        "pool_keys", "pool_queries", "score_kernel", "choose_kernel", "attention_kernel",
    }  # fmt: skip
    assert all(kernel["cached"] for kernel in again)
    assert sorted(tmp_path.rglob("*.cubin")) == files


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--arch", "gfx942"], "--arch: expected sm80, sm90, ..., got 'gfx942'"),
        (["--arch", "sm75"], "--arch: expected sm80, sm90, ..., got 'sm75'"),
        (["--dtype", "float32"], "--dtype: expected bfloat16 or float16, got 'float32'"),
        (["--head-dim", "20"], "--head-dim: expected a multiple of 8 between 16 and 256, got 20"),
        (["--set", "block_size=32"], "--block-size: expected 64 or 128, got 32"),
        (["--kv-heads", "3"], "--kv-heads: expected a divisor of --heads 4, got 3"),
        (["--page-size", "0"], "--page-size: expected an integer >= 1"),
    ],
)
def test_bad_option_is_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", *SMALL, *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert says in captured.err
