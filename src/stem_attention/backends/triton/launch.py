"""Launch choices: what was measured to be fastest, as data, with the nearest match for what was not measured."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from triton.runtime import driver


@dataclass(frozen=True)
class Launch:
    """Tile of keys, warps and pipeline stages of the attention kernel, and whether it may use tensor descriptors."""

    tile: int
    warps: int
    stages: int
    tma: bool


@dataclass(frozen=True)
class ScoreLaunch:
    """Tile of the score kernel in query blocks and key blocks, its inner step, warps and pipeline stages."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


@dataclass(frozen=True)
class MassLaunch:
    """Tile of the mass kernel in query pools and key pools, warps and pipeline stages."""

    rows: int
    columns: int
    warps: int
    stages: int


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(files(__package__).joinpath("launch.json").read_text())
    return table


def architecture(device: torch.device) -> str:
    """``"sm90"`` and the like, a ``gfx`` name on AMD, ``"cpu"`` under Triton's interpreter.

    Meta tensors stand for those of the card that :func:`stem_attention.backends.triton.offline.offline` compiles for.
    """
    return f"sm{driver.active.get_current_target().arch}" if device.type == "meta" else _architecture(device)


@cache
def _architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm{properties.major}{properties.minor}"


def has_tma(device: torch.device) -> bool:
    """Whether the card has the bulk tensor copy engine (Hopper and later)."""
    name = architecture(device)
    return name.startswith("sm") and int(name[2:]) >= 90


def _nearest(table: dict[str, Any], name: str) -> Any:
    """The entry of the nearest measured architecture: itself, else the newest one not newer, else ``"default"``."""
    if name not in table:
        known = [int(entry[2:]) for entry in table if entry.startswith("sm")]
        older = [number for number in known if name.startswith("sm") and number <= int(name[2:])]
        name = f"sm{max(older)}" if older else "default"
    return table[name]


@cache
def launch_for(name: str, head_dim: int, block_size: int, descriptors: bool = True) -> Launch:
    """The attention kernel's choice on the nearest measured architecture, with tensor descriptors or where none will do."""
    entries = [
        entry
        for entry in _nearest(_table()["attention"], name)
        if block_size % entry["tile"] == 0 and head_dim <= entry["max_head_dim"]
    ]
    exact = [entry for entry in entries if entry["block_size"] == block_size] or entries
    usable = [entry for entry in exact if entry["tma"] == descriptors] or exact
    best = min(usable, key=lambda entry: entry["max_head_dim"])
    return Launch(best["tile"], best["warps"], best["stages"], best["tma"])


@cache
def score_launch_for(name: str) -> ScoreLaunch:
    """The score kernel's choice on the nearest measured architecture."""
    return ScoreLaunch(**_nearest(_table()["score"], name))


def attention_launch(device: torch.device, head_dim: int, block_size: int, descriptors: bool) -> Launch:
    """Launch choice for a device, head dimension and block size; see :func:`launch_for`."""
    return launch_for(architecture(device), head_dim, block_size, descriptors)


def score_launch(device: torch.device) -> ScoreLaunch:
    """Launch choice of the score kernel for a device."""
    return score_launch_for(architecture(device))


@cache
def mass_launch_for(name: str) -> MassLaunch:
    """The mass kernel's choice on the nearest measured architecture."""
    return MassLaunch(**_nearest(_table()["mass"], name))


def mass_launch(device: torch.device) -> MassLaunch:
    """Launch choice of the mass kernel for a device."""
    return mass_launch_for(architecture(device))
