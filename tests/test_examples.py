"""Every example runs as a user runs it: a script, somewhere else, in seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example: Path, tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, example], cwd=tmp_path, check=False, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip(), "an example shows what it did"
    assert "Warning" not in ran.stderr
    assert all(file.suffix == ".png" and file.read_bytes().startswith(b"\x89PNG") for file in tmp_path.iterdir())


def test_every_example_is_listed_in_the_docs() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    assert [example.name for example in EXAMPLES if f"examples/{example.name}" not in index] == []
