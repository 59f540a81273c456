"""Two processes give what one gives: its bits where they split heads or a prompt, its gradients where they split a batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SPLIT_HEADS, SPREAD_PROMPT, SPLIT_BATCH = "tests/parallel_heads.py", "examples/ulysses.py", "tests/parallel_training.py"

on_two_gpus = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs that torch sees")]


@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        (SPLIT_HEADS, "", "rank 1 of 2 on cpu: nothing differs"),
        (SPREAD_PROMPT, "--tokens 3000 --heads 6 2 32", "equal to one process, bit for bit"),
        (SPLIT_BATCH, "", "rank 1 of 2 on cpu: gradients of one process"),
        pytest.param(SPLIT_BATCH, "", "rank 1 of 2 on cuda:1: gradients of one process", marks=on_two_gpus),
        pytest.param(SPLIT_HEADS, "", "rank 1 of 2 on cuda:1: nothing differs", marks=on_two_gpus),
        pytest.param(SPREAD_PROMPT, "--tokens 65536 --heads 32 8 128", "equal to one process, bit for bit", marks=on_two_gpus),
    ],
    ids=["heads", "prompt", "batch", "batch-nccl", "heads-nccl", "prompt-nccl"],
)
def test_two_ranks_give_what_one_process_gives(script, arguments, says, request):
    gpus = {} if request.node.get_closest_marker("gpu") else {"CUDA_VISIBLE_DEVICES": ""}
    environment = {
        **os.environ,
        **gpus,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "NCCL_NVLS_ENABLE": "0",
    }  # NVLink multicast is not everywhere
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(ROOT / script)]
    done = subprocess.run(
        [*command, *arguments.split()], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert says in done.stdout
