"""Launch choices by architecture: what was measured to be fastest, as data, and the nearest match for what was not."""

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
class TileLaunch:
    """Tile of a selection kernel, warps and pipeline stages.

    A tile of scores counts query blocks and key blocks, and has an inner step; a tile of masses counts query and key pools.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    inner: int = 0


@dataclass(frozen=True)
class BackwardLaunch:
    """Tokens of a block that a program of the gradient owns, tokens that it reads in a step, and as in :class:`Launch`."""

    own: int
    tile: int
    warps: int
    stages: int
    tma: bool

    @property
    def options(self) -> dict[str, int]:
        """Return the compiler's options."""
        return {"num_warps": self.warps, "num_stages": self.stages}


@cache
def _table(kernel: str) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(files(__package__).joinpath("launch.json").read_text())[kernel]
    return table


def architecture(device: torch.device) -> str:
    """Name a device's architecture: ``"sm90"`` and the like, a ``gfx`` name on AMD, ``"cpu"`` under Triton's interpreter.

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


def has_tma(name: str) -> bool:
    """Tell whether an architecture has the bulk tensor copy engine (Hopper and later)."""
    return name.startswith("sm") and int(name[2:]) >= 90


def _nearest(table: dict[str, Any], name: str) -> Any:
    """The entry of the nearest measured architecture: itself, else the newest one not newer, else ``"default"``."""
    if name not in table:
        known = [int(entry[2:]) for entry in table if entry.startswith("sm")]
        older = [number for number in known if name.startswith("sm") and number <= int(name[2:])]
        name = f"sm{max(older)}" if older else "default"
    return table[name]


@cache
def attention_launch(name: str, head_dim: int, block_size: int, descriptors: bool = True) -> Launch:
    """Choose for the attention kernel on an architecture, with tensor descriptors or where none will do."""
    best = _entry("attention", name, head_dim, block_size, descriptors)
    return Launch(best["tile"], best["warps"], best["stages"], best["tma"])


def _entry(kernel: str, name: str, head_dim: int, block_size: int, descriptors: bool) -> dict[str, Any]:
    nearest = _nearest(_table(kernel), name)
    entries = [entry for entry in nearest if block_size % entry["tile"] == 0 and head_dim <= entry["max_head_dim"]]
    exact = [entry for entry in entries if entry["block_size"] == block_size] or entries
    usable = [entry for entry in exact if entry["tma"] == descriptors] or exact
    best: dict[str, Any] = min(usable, key=lambda entry: entry["max_head_dim"])
    return best


@cache
def backward_launch(kernel: str, name: str, head_dim: int, block_size: int, descriptors: bool) -> BackwardLaunch:
    """Choose for the ``"dq"`` or the ``"dkv"`` kernel; ``head_dim`` is the larger of those of keys and values."""
    best = _entry(kernel, name, head_dim, block_size, descriptors)
    tma = descriptors and best["tma"]
    return BackwardLaunch(best["own"], best["tile"], best["warps"], best["stages"], tma)


@cache
def tile_launch(kernel: str, name: str) -> TileLaunch:
    """Choose for the ``"score"`` or the ``"mass"`` kernel on an architecture."""
    return TileLaunch(**_nearest(_table(kernel), name))
