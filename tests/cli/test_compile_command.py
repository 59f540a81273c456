"""compile: what one process compiled, no other compiles again, whatever the prompt's length."""

import json
import subprocess
import sys

import pytest

from stem_attention.cli import main

pytest.importorskip("triton")

SMALL = ["--arch", "sm80", "--heads", "4", "--kv-heads", "2", "--head-dim", "32"]


def compile_in_a_new_process(lengths):
    command = [sys.executable, "-m", "stem_attention.cli", "compile", *SMALL, "--lengths", lengths, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["kernels"]


def test_another_process_finds_everything_compiled(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert main(["compile", *SMALL, "--lengths", "5000"]) == 0
    out, files = " ".join(capsys.readouterr().out.split()), sorted(tmp_path.rglob("*.cubin"))
    assert f"{len(files)} kernels of backend triton for sm80 lie in {tmp_path}, {len(files)} of them new." in out
    assert len(files) >= 3
    # 6016 is a multiple of 16, 5001 is not, 4097 ends one token into a block: none gets a kernel of its own.
    again = compile_in_a_new_process("5001,6016,4097")
    assert "attention_kernel" in {kernel["kernel"] for kernel in again}
    assert all(kernel["cached"] for kernel in again)
    assert sorted(tmp_path.rglob("*.cubin")) == files


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--arch", "gfx942"], 1, "--arch: expected sm80, sm90, ..., got 'gfx942'"),
        (["--arch", "sm75"], 1, "--arch: expected sm80, sm90, ..., got 'sm75'"),
        (["--dtype", "float32"], 1, "--dtype: expected bfloat16 or float16, got 'float32'"),
        (["--head-dim", "20"], 1, "--head-dim: expected a multiple of 8 between 16 and 256, got 20"),
        (["--head-dim", "256", "--value-dim", "16"], 1, "--value-dim: expected one that a kernel takes, got 16"),
        (["--value-dim", "20"], 1, "--value-dim: expected one that a kernel takes, got 20"),
        (["--policy", "mass:block_size=32"], 1, "--policy: block_size: expected 64 or 128, got 32"),
        (["--kv-heads", "3"], 1, "--kv-heads: expected a divisor of --heads 4, got 3"),
        (["--page-size", "0"], 2, "--page-size: "),
        (["--lengths", "12x"], 2, "--lengths: expected numbers of tokens"),
        (["--lengths", "0"], 2, "--lengths: expected numbers of tokens"),
        (["--lengths", "8192,2147483648"], 2, "--lengths: expected numbers of tokens below 2^31"),
        (["--lengths", "9" * 5000], 2, "--lengths: expected numbers of tokens below 2^31"),
        (["--model", "magic"], 1, "--model: expected one of llama-3.1-8b"),
    ],
)
def test_bad_option_is_one_line(arguments, code, says, complaint):
    assert says in complaint(main, ["compile", *SMALL, *arguments], code)
