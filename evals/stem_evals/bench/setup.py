"""Describe what every suite is asked, and what it runs on."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stem_attention import __version__, explain
from stem_attention.backends import Explanation
from stem_attention.cli.system import device_name, version
from stem_attention.models.shapes import Heads
from stem_attention.policies import PolicySpec

_DRIVER = Path("/proc/driver/nvidia/version")
_CPU_REPEATS, _GPU_REPEATS = 5, 20


@dataclass(frozen=True)
class Setup:
    """A benchmark as it was asked for.

    Attributes:
        spec: Which blocks to keep, tuned at every length.
        lengths: Tokens, ascending.
        heads: Attention heads.
        dtype: Of the inputs.
        device: Where they lie.
        dense_below: Prompts of fewer tokens run dense; None for the backend's own limit.
        repeats: Timed rounds; None for a number that suits.
        seed: Of what is drawn.
        dense: Whether dense attention is timed too.
        start: Called with the name of what begins and its number of steps; what it returns is called after every step.
    """

    spec: PolicySpec
    lengths: list[int]
    heads: Heads
    dtype: torch.dtype
    device: torch.device
    dense_below: int | None
    repeats: int | None
    seed: int
    dense: bool
    start: Callable[[str, int], Callable[[], None]]

    @property
    def rounds(self) -> int:
        """Timed rounds of a layer's attention."""
        return self.repeats or (_CPU_REPEATS if self.device.type == "cpu" else _GPU_REPEATS)

    def inputs(self, length: int) -> list[Tensor]:
        """Draw one layer's normal q, k and v, ``(1, length, heads, dim)``, the same on the same kind of device.

        Drawn where they are used: at a million tokens the CPU would need minutes and more memory than it may have.
        """
        draw, (heads, kv_heads, dim) = torch.Generator(self.device).manual_seed(self.seed), vars(self.heads).values()
        sizes = [(1, length, count, dim) for count in (heads, kv_heads, kv_heads)]
        return [torch.randn(size, generator=draw, dtype=self.dtype, device=self.device) for size in sizes]

    def explained(self, length: int) -> Explanation:
        """Return which backend runs a length's policy, and below which length attention is dense."""
        policy, head_dim = self.spec.at(length), self.heads.head_dim
        return explain(device=self.device, dtype=self.dtype, head_dim=head_dim, policy=policy, dense_below=self.dense_below)

    def facts(self) -> dict[str, Any]:
        """Return what a benchmark runs on and with, as plain JSON types; the policy is that of the first length."""
        known = self.explained(self.lengths[0])
        return {
            "stem_attention": __version__,
            "torch": torch.__version__,
            "triton": version("triton"),
            "python": platform.python_version(),
            "driver": None if self.device.type == "cpu" else _driver(),
            "device": str(self.device),
            "device_name": device_name(self.device),
            "threads": torch.get_num_threads(),
            "backend": known.chosen,
            "dtype": str(self.dtype).removeprefix("torch."),
            **vars(self.heads),
            "spec": self.spec.text,
            "policy": self.spec.at(self.lengths[0]).to_dict(),
            "dense_below": known.dense_below,
        }


def _driver() -> str | None:
    """The NVIDIA driver's version, where the kernel gives it."""
    found = re.search(r"\d+\.\d+(\.\d+)?", _DRIVER.read_text()) if _DRIVER.is_file() else None
    return found.group() if found else None
