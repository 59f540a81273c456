"""Imports point one way, file by file and lazy ones too; no files need each other; optional packages stay in their rooms."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "stem_attention"
SOURCE = Path(__file__).resolve().parents[1] / "src" / PACKAGE

# From the bottom up: a file imports from its own room and from rooms in front of it; rooms on one line know nothing of one
# another. The longest name that fits is a file's room; "" is the package itself, which gathers the public names.
ORDER = (
    ("errors",),
    ("blocks",),
    ("selection",),
    ("checks",),
    ("policies",),
    ("call",),
    ("backends",),
    ("ops",),
    ("gradients",),
    ("api",),
    ("",),
    ("testing",),
    ("integrations.serving", "integrations.transformers"),
    ("integrations.vllm", "integrations.sglang"),
    ("integrations",),
    ("models",),
    ("calibrate",),
    ("cli",),
)
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
# Shared input makers are for measuring, not for the library's own work.
TESTING_USERS = ("testing", "models", "calibrate", "cli")

# Where each third-party package may be imported; torch and its typing_extensions come with the library.
HOMES = {
    "torch": ("",),
    "typing_extensions": ("",),
    "triton": ("backends.triton", "backends.hopper"),
    "flash_attn": ("backends.fa4",),
    "cutlass": ("backends.fa4",),  # comes with flash-attn-4
    "transformers": ("integrations.transformers", "models"),
    "huggingface_hub": ("models",),  # comes with transformers
    "vllm": ("integrations.vllm",),
    "sglang": ("integrations.sglang",),
    "prometheus_client": ("integrations.serving",),  # comes with vLLM and SGLang
    "matplotlib": ("models", "cli"),
    "rich": ("cli",),
    "typer": ("cli",),
}

Modules = dict[str, str]  # name inside the package ("" for the package itself) to source text


def installed_modules() -> Modules:
    """Every file of the library."""
    paths = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in SOURCE.rglob("*.py")}
    return {name.removesuffix("__init__").removesuffix("."): path.read_text() for name, path in paths.items()}


def imports(name: str, modules: Modules) -> Iterator[str]:
    """Absolute names of what a file imports: at its top, inside functions, and for type checkers alone."""
    for node in ast.walk(ast.parse(modules[name])):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            for alias in node.names:
                is_file = _inside(f"{source}.{alias.name}") in modules
                yield f"{source}.{alias.name}" if is_file else source


def _inside(module: str) -> str | None:
    """Name of a module inside the package."""
    return module.removeprefix(PACKAGE).removeprefix(".") if module.partition(".")[0] == PACKAGE else None


def _lies_in(name: str, home: str) -> bool:
    return not home or name == home or name.startswith(f"{home}.")


def _room(name: str) -> str | None:
    return max((room for room in RANK if (_lies_in(name, room) if room else not name)), key=len, default=None)


def _internal_fault(name: str, target: str) -> str | None:
    room, wanted = _room(name), _room(target)
    if wanted is None:
        return f"{target} has no place in ORDER"
    if room is None:  # said of the file itself
        return None
    if RANK[wanted] > RANK[room]:
        return "points up"
    if RANK[wanted] == RANK[room] and wanted != room:
        return "rooms side by side do not import one another"
    if wanted == "testing" and room not in TESTING_USERS:
        return "testing is for measuring, not for the library's own work"
    mine, its = name.split(".")[:2], target.split(".")[:2]
    # Openly, and nowhere else: these kernels stand behind the Triton backend's selection.
    allowed = mine == its or (mine[1:] in (["hopper"], ["fa4"]) and its[1:] == ["triton"])
    if room == wanted == "backends" and all(len(part) == 2 and part[1] in BACKENDS for part in (mine, its)) and not allowed:
        return "backends do not import one another"
    return None


BACKENDS = {path.name for path in (SOURCE / "backends").iterdir() if path.is_dir()}


def faults(modules: Modules) -> list[str]:
    """One line for every import that breaks a rule."""
    found = []
    for name in modules:
        if _room(name) is None:
            found.append(f"{name} has no place in ORDER")
        for target in imports(name, modules):
            top, inner = target.partition(".")[0], _inside(target)
            if inner is not None:
                fault = _internal_fault(name, inner)
            elif top in HOMES:
                fault = None if any(_lies_in(name, home) for home in HOMES[top]) else f"{top} belongs in {HOMES[top]}"
            else:
                fault = None if top in sys.stdlib_module_names else "neither the standard library nor in HOMES"
            if fault:
                found.append(f"{name or PACKAGE} imports {target}: {fault}")
    return found


def cycle(modules: Modules) -> list[str]:
    """Files that need one another, in a ring, or nothing.

    All that :func:`imports` finds counts. What Python runs on the way to a file, the ``__init__`` of its folders, does not:
    by that rule a folder whose ``__init__`` gathers names from its files is a ring already.
    """
    graph = {name: {_inside(target) for target in imports(name, modules)} & modules.keys() for name in modules}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_import_of_the_library_obeys_the_rules_and_no_files_need_each_other() -> None:
    modules = installed_modules()
    assert {"", "api", "policies", "policies.stem", "backends.torch.attention"} <= modules.keys()
    assert faults(modules) == []
    assert cycle(modules) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("errors", "from stem_attention.blocks import BlockGrid"),
        ("policies.stem", "from stem_attention import api"),
        ("policies.stem", "def late():\n    from stem_attention.backends import registry"),
        ("policies.stem", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from stem_attention.call import Call"),
        ("api", "from stem_attention.integrations import transformers"),
        ("integrations.vllm.host", "from stem_attention.integrations.sglang.layers import layers"),
        ("integrations.serving.rows", "from stem_attention.integrations.vllm.host import Host"),
        ("backends.torch.attention", "from stem_attention.backends.reference import attend"),
        ("backends.triton.mass", "from stem_attention.backends.hopper import HopperBackend"),
        ("backends.torch", "from ..reference import attend"),
        ("api", "from stem_attention.testing import make_qkv"),
        ("api", "from stem_attention.attic import old"),
        ("attic", "import torch"),
        ("api", "import numpy as np"),
        ("cli.run", "import stem_evals"),
        ("backends.registry", "def late():\n    import triton"),
        ("integrations.transformers", "import vllm"),
    ],
)
def test_a_planted_bad_import_is_found(name: str, line: str) -> None:
    modules = {"backends.reference": "", "api": "", name: line}
    assert len(faults(modules)) == 1, faults(modules)


@pytest.mark.parametrize(
    "modules",
    [
        {"policies.a": "from stem_attention.policies.b import B", "policies.b": "import stem_attention.policies.a"},
        {"ops": "from stem_attention import call", "call": "def late():\n    from stem_attention import ops"},
        {"call": "from stem_attention import blocks", "blocks": "if TYPE_CHECKING:\n    from stem_attention.call import Call"},
        {"a": "import stem_attention.b", "b": "from stem_attention.c import C", "c": "from stem_attention import a"},
    ],
)
def test_a_planted_cycle_is_found(modules: Modules) -> None:
    assert set(cycle(modules)) == set(modules)
