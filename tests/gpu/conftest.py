"""``--gpu-report FILE`` writes what ran, where and with which result as JSON."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

from stem_attention import explain


@pytest.fixture(params=["hopper", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each GPU backend that can run the test on this card."""
    head_dim = request.node.callspec.params.get("dim", 128)
    found = explain(device="cuda", dtype=torch.bfloat16, head_dim=head_dim, backend=request.param)
    if found.chosen is None:
        pytest.skip(found.reasons[request.param])
    return request.param


@pytest.fixture
def _return_memory() -> Iterator[None]:
    """Give back what a large test took, so that its neighbours find room."""
    yield
    torch.cuda.empty_cache()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-report", type=Path, help="write the GPU tests' result to this file as JSON")
    parser.addoption("--gpu-commit", help="the commit under test, where git cannot tell")


def pytest_configure(config: pytest.Config) -> None:
    # A run that starts above this folder reads this file too late to know the options.
    path = config.getoption("--gpu-report", default=None)
    if path is not None:
        config.pluginmanager.register(_Report(path, config.getoption("--gpu-commit")), "gpu-report")


class _Report:
    def __init__(self, path: Path, commit: str | None) -> None:
        self.path, self.commit, self.begun = path, commit, time.monotonic()
        self.outcomes: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        entry = self.outcomes.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
        entry["seconds"] = round(entry["seconds"] + report.duration, 3)
        if not report.passed and entry["outcome"] != "failed":
            entry["outcome"] = report.outcome

    def pytest_sessionfinish(self) -> None:
        outcomes = [entry["outcome"] for entry in self.outcomes.values()]
        result = {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "compute_capability": ".".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else None,
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            "packages": {name: _version(name) for name in ("torch", "triton", "transformers")},
            "commit": self.commit or _commit(),
            "counts": {outcome: outcomes.count(outcome) for outcome in ("passed", "failed", "skipped")},
            "seconds": round(time.monotonic() - self.begun, 1),
            "tests": self.outcomes,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(result, indent=1) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    run = subprocess.run([git, "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return run.stdout.strip() or None
