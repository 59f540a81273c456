"""Imports point one way, backends do not know one another, and optional packages stay in their rooms."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "stem_attention"
SOURCE = Path(__file__).resolve().parents[1] / "src" / PACKAGE

# From the bottom up: a module imports from its own room and from rooms named before it. "" is the package itself, which
# gathers the public names. Shared input makers stand apart (see TESTING_USERS).
ROOMS = (
    "errors", "config", "selection", "checks", "policies", "backends", "ops", "api", "varlen", "testing", "", "integrations",
    "evaluation", "cli",
)  # fmt: skip
TESTING_USERS = ("testing", "evaluation", "cli")

# Where each third-party package may be imported, as prefixes of module names; torch may be used everywhere.
HOMES = {
    "torch": ("",),
    "triton": ("backends.triton", "backends.hopper"),
    "transformers": ("integrations.transformers", "evaluation"),
    "safetensors": ("evaluation.models",),
    "tokenizers": ("evaluation.stress",),
    "vllm": ("integrations.vllm",),
    "sglang": ("integrations.sglang",),
    "lm_eval": ("evaluation",),
    "nltk": ("evaluation.ruler",),
    "numpy": ("evaluation.ruler",),
    "tqdm": ("evaluation.lm_host",),
    "matplotlib": ("cli", "evaluation"),
    "rich": ("cli",),
    "typer": ("cli",),
}

Modules = dict[str, str]  # name inside the package ("" for the package itself) to source text


def installed_modules() -> Modules:
    """Every module of the library."""
    paths = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in SOURCE.rglob("*.py")}
    return {name.removesuffix("__init__").removesuffix("."): path.read_text() for name, path in paths.items()}


def imports(name: str, modules: Modules) -> Iterator[str]:
    """Absolute names of what a module imports, at its top or inside functions, types included."""
    for node in ast.walk(ast.parse(modules[name])):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield f"relative import of {'.' * node.level}{node.module or ''}"
                continue
            inner = node.module.removeprefix(PACKAGE).removeprefix(".") if _is_ours(node.module) else None
            for alias in node.names:
                submodule = f"{inner}.{alias.name}".removeprefix(".")
                is_module = inner is not None and submodule in modules
                yield f"{node.module}.{alias.name}" if is_module else str(node.module)


def _is_ours(module: str | None) -> bool:
    return module is not None and module.partition(".")[0] == PACKAGE


def _lies_in(name: str, home: str) -> bool:
    """Whether a module is ``home``, lies inside it, or is a file split off it, as transformers_mask off transformers."""
    return not home or name == home or name.startswith((f"{home}.", f"{home}_"))


def _internal_fault(name: str, target: str) -> str | None:
    room, wanted = name.partition(".")[0], target.partition(".")[0]
    if room not in ROOMS or wanted not in ROOMS:
        return f"{room if room not in ROOMS else wanted} has no place in ROOMS"
    if ROOMS.index(wanted) > ROOMS.index(room):
        return "points up"
    if wanted == "testing" and room not in TESTING_USERS:
        return "testing is for measuring, not for the library's own work"
    mine, its = name.split(".")[:2], target.split(".")[:2]
    between_folders = all((SOURCE / "/".join(part)).is_dir() and len(part) == 2 for part in (mine, its))
    if room == wanted == "backends" and between_folders and mine != its:
        return "backends do not import one another"
    return None


def faults(modules: Modules) -> list[str]:
    """One line for every import that breaks a rule."""
    found = []
    for name in modules:
        for target in imports(name, modules):
            top = target.partition(".")[0]
            if top == PACKAGE:
                fault = _internal_fault(name, target.removeprefix(PACKAGE).removeprefix("."))
            elif top in HOMES:
                fault = None if any(_lies_in(name, home) for home in HOMES[top]) else f"{top} belongs in {HOMES[top]}"
            else:
                fault = None if top in sys.stdlib_module_names else "not the standard library and not in HOMES"
            if fault:
                found.append(f"{name or PACKAGE} imports {target}: {fault}")
    return found


def test_every_import_of_the_library_obeys_the_rules() -> None:
    modules = installed_modules()
    assert {"", "api", "config", "policies.stem", "backends.torch.attention"} <= modules.keys()
    assert faults(modules) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("errors", "from stem_attention.config import StemConfig"),
        ("config", "import stem_attention.selection"),
        ("policies.stem", "from stem_attention import api"),
        ("policies.stem", "from stem_attention import StemConfig"),
        ("policies.stem", "def late():\n    from stem_attention.backends import registry"),
        ("api", "from stem_attention.integrations import transformers"),
        ("evaluation.needles", "from stem_attention.cli import main"),
        ("backends.torch.attention", "from stem_attention.backends.reference import attend"),
        ("backends.torch", "from stem_attention.backends import reference"),
        ("backends.torch", "from ..reference import attend"),
        ("api", "from stem_attention.testing import make_qkv"),
        ("api", "from stem_attention.attic import old"),
        ("api", "import numpy as np"),
        ("backends.torch.attention", "import triton.language as tl"),
        ("backends.registry", "def late():\n    import triton"),
        ("cli.run", "from transformers import AutoModelForCausalLM"),
        ("integrations.transformers", "import vllm"),
        ("integrations.transformers", "import rich"),
        ("policies.stem", "import matplotlib.pyplot as plt"),
    ],
)
def test_a_planted_bad_import_is_found(name: str, line: str) -> None:
    modules = {"backends.reference": "", "api": "", name: line}
    assert len(faults(modules)) == 1, faults(modules)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("", "from stem_attention.api import stem_attention"),
        ("cli.run", "from stem_attention import StemConfig, __version__"),
        ("backends.registry", "from stem_attention.backends.torch import TorchBackend"),
        ("backends.torch", "from stem_attention.backends.torch.attention import attend"),
        ("backends.triton.kernels", "import triton"),
        ("integrations.transformers_mask", "from transformers.masking_utils import sdpa_mask"),
        ("evaluation.ruler", "from stem_attention.testing import make_qkv"),
        ("cli.bench", "import json, rich.table"),
    ],
)
def test_a_good_import_passes(name: str, line: str) -> None:
    assert faults({name: line}) == []
