"""Shapes of attention, and random inputs of a shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """One attention problem, batch 1."""

    length: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


def random_inputs(shape: Shape, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q, k and v, ``(1, length, heads, dim)``, the same for the same seed on the same kind of device.

    Drawn where they are used: at a million tokens the CPU would need minutes and more memory than it may have.
    """
    generator = torch.Generator(shape.device).manual_seed(seed)
    sizes = [(1, shape.length, heads, shape.head_dim) for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
    q, k, v = (torch.randn(size, generator=generator, dtype=shape.dtype, device=shape.device) for size in sizes)
    return q, k, v
