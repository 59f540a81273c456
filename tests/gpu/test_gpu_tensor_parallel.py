"""On two GPUs, over NCCL: what test_tensor_parallel.py checks on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs that torch sees")]

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        ("tests/parallel_heads.py", [], "rank 1 of 2 on cuda:1: nothing differs"),
        ("examples/ulysses.py", ["--tokens", "65536", "--heads", "32", "8", "128"], "equal to one process, bit for bit"),
    ],
)
def test_two_ranks_give_the_bits_of_one_process(script: str, arguments: list[str], says: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(ROOT / script)]
    environment = {**os.environ, "NCCL_NVLS_ENABLE": "0"}  # NVLink multicast is not everywhere
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert says in done.stdout
