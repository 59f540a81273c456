"""The promises of this folder for the Triton kernels, by Triton's interpreter, which a whole process must choose."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton exists for Linux alone")
def test_the_triton_kernels_keep_every_promise_under_the_interpreter():
    trust = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not gpu"]
    command += [str(trust), str(trust.with_name("fuzz")), f"--ignore={__file__}"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=trust.parents[1])
    assert run.returncode == 0, run.stdout + run.stderr
    assert "passed" in run.stdout
