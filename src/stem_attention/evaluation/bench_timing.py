"""The clock. Contestants run in turn, so that a machine that slows down or heats up does so for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], object]

# Written before every timed call, it pushes inputs out of the largest L2 cache and keeps the GPU busy while the call is
# being launched.
_FLUSHED_BYTES = 256 << 20
_WARM_UP = 1
_GPU_WARM_UP = 3  # clocks rise only under load


def round_count(device: torch.device, repeats: int) -> int:
    """Rounds that :func:`time_in_turn` runs, untimed ones included."""
    return repeats + (_GPU_WARM_UP if device.type == "cuda" else _WARM_UP)


def time_in_turn(
    calls: Mapping[str, Call], device: torch.device, repeats: int, on_round: Callable[[], None]
) -> dict[str, list[float]]:
    """Run every call once per round, another one first in every round: whoever follows a large one finds cold caches.

    Args:
        calls: By name.
        device: Where they run.
        repeats: Timed rounds.
        on_round: Called after every round.

    Returns:
        Seconds of each timed round, by name.
    """
    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
    names, rounds = list(calls), round_count(device, repeats)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for current in range(rounds):
        first = current % len(names)
        order = [*names[first:], *names[:first]]
        in_order = [calls[name] for name in order]
        if flushed is None:
            times = [_host_seconds(call, device) for call in in_order]
        else:
            times = _gpu_seconds(in_order, device, flushed)
        if current >= rounds - repeats:
            for name, taken in zip(order, times, strict=True):
                seconds[name].append(taken)
        on_round()
    return seconds


def _host_seconds(call: Call, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _gpu_seconds(calls: list[Call], device: torch.device, flushed: Tensor) -> list[float]:
    event: Any = torch.cuda.Event  # which torch has no types for
    with torch.cuda.device(device):
        spans = []
        for call in calls:
            flushed.zero_()
            start, end = (event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            spans.append((start, end))
        torch.cuda.synchronize(device)
        return [start.elapsed_time(end) / 1e3 for start, end in spans]
