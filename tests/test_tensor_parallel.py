"""Tensor parallelism: two processes that split heads, and a prompt spread over two processes, give one process's bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def on_two_ranks(script: str, *arguments: str, gpus: str = "") -> str:
    """Run a script with torchrun; returns what it printed. ``gpus``: those that torch may see."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(ROOT / script),
        *arguments,
    ]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_split_heads_give_the_bits_of_one_process() -> None:
    printed = on_two_ranks("tests/parallel_heads.py")
    assert all(f"rank {rank} of 2 on cpu: nothing differs" in printed for rank in range(2))


def test_a_prompt_spread_over_two_processes_gives_the_bits_of_one() -> None:
    printed = on_two_ranks("examples/ulysses.py", "--tokens", "3000", "--heads", "6", "2", "32")
    assert "equal to one process, bit for bit" in printed
