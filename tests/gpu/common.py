"""What the GPU tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import pytest
import torch

from stem_attention import BlockSelection, Mass, Policy, Stem

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees")]

MIB, GIB = 1 << 20, 1 << 30

FACTORS = (0.5, 2.0, 1.0, 4.0, 0.25, 1.5, 1.0, 3.0)

Rule: TypeAlias = Callable[[int], Policy]
RULES: dict[str, Rule] = {
    "stem": lambda heads: Stem(),
    "mass": lambda heads: Mass(),
    "factors": lambda heads: Mass(head_factors=[[FACTORS[head % 8] for head in range(heads)]]),
}

# Sequences of a packed batch: (queries, keys).
LENGTHS = [(300, 300), (1, 4097), (0, 900), (2500, 2500), (1300, 3011), (128, 128), (7, 7)]


def free_memory() -> int:
    """Bytes of the current GPU that nobody has taken; 0 without one."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


def random_qkv(batch, q_len, kv_len, q_heads, kv_heads, dim, seed=0, dtype=torch.bfloat16, value_dim=None):
    """Normal numbers drawn on the device, for sizes at which ``testing.make_qkv`` would take too long."""
    draw = torch.Generator("cuda").manual_seed(seed)
    shapes = ((batch, q_len, q_heads, dim), *((batch, kv_len, kv_heads, width) for width in (dim, value_dim or dim)))
    return tuple(torch.randn(shape, generator=draw, device="cuda", dtype=dtype) for shape in shapes)


def captured(function):
    """A graph of a call, warmed up on a side stream as torch asks, and its result."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


def differing_rate(got: BlockSelection, expected: BlockSelection) -> float:
    """Blocks that just one of two selections keeps, over the blocks that are kept."""
    a, b = got.to_mask(), expected.to_mask().to(got.indices.device)
    return (a != b).sum().item() / b.sum().item()


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """torch raises where the host would wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def at_most_extra_bytes(limit: int) -> Iterator[None]:
    """At no time may more than ``limit`` bytes be allocated beyond what there was."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= limit, f"{extra / 2**20:.1f} MiB of {limit / 2**20:.1f} MiB"
