"""The kernels' results without a GPU: a process of its own runs interpreted.py under Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path


def test_kernels_agree_with_the_reference_under_the_interpreter():
    tests = Path(__file__).with_name("interpreted.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(tests)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
