"""The clock. Contestants run in turn, so that a machine that slows down or heats up does so for all of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Call = Callable[[], object]

# Written before every timed call, it pushes inputs out of the largest L2 cache.
_FLUSHED_BYTES = 256 << 20
# It is written again and again until the call has surely been launched, so that an event pair times the GPU's work alone, as
# in a model whose queue never runs dry. No GPU writes it faster than this.
_LEAST_FLUSH_SECONDS = 25e-6
_MOST_FLUSHES = 400
_WARM_UP = 1
_GPU_WARM_UP = 3  # clocks rise only under load


@dataclass(frozen=True)
class Times:
    """Seconds of the timed rounds of one call.

    Attributes:
        work: On a CPU the whole call, on a GPU what the GPU did.
        launch: On a GPU, how long the call kept the host; empty on a CPU.
    """

    work: list[float] = field(default_factory=list)
    launch: list[float] = field(default_factory=list)


def round_count(device: torch.device, repeats: int) -> int:
    """Rounds that :func:`time_in_turn` runs, untimed ones included."""
    return repeats + (_GPU_WARM_UP if device.type == "cuda" else _WARM_UP)


def time_in_turn(
    calls: Mapping[str, Call], device: torch.device, repeats: int, on_round: Callable[[], None]
) -> dict[str, Times]:
    """Run every call once per round, in an order drawn anew for every round, the same in every run.

    Whoever follows a large call finds a hot card with a lower clock, who follows a small one a rested card: nobody may always
    follow the same one.

    Args:
        calls: By name.
        device: Where they run.
        repeats: Timed rounds.
        on_round: Called after every round.

    Returns:
        Times by name.
    """
    clock = _GpuClock(device) if device.type == "cuda" else _host_seconds
    names, rounds = list(calls), round_count(device, repeats)
    times = {name: Times() for name in names}
    draw = random.Random(0)
    for current in range(rounds):
        draw.shuffle(names)
        for name in names:
            work, launch = clock(calls[name], device)
            if current >= rounds - repeats:
                times[name].work.append(work)
                times[name].launch.extend(launch)
        on_round()
    return times


def _host_seconds(call: Call, device: torch.device) -> tuple[float, list[float]]:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start, []


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class _GpuClock:
    def __init__(self, device: torch.device) -> None:
        self._flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device=device)
        self._launches: dict[Call, float] = {}

    def __call__(self, call: Call, device: torch.device) -> tuple[float, list[float]]:
        event: Any = torch.cuda.Event  # which torch has no types for
        with torch.cuda.device(device):
            start, end = (event(enable_timing=True) for _ in range(2))
            for _ in range(min(_MOST_FLUSHES, 1 + int(2 * self._launches.get(call, 0.0) / _LEAST_FLUSH_SECONDS))):
                self._flushed.zero_()
            start.record()
            began = time.perf_counter()
            call()
            launch = time.perf_counter() - began
            end.record()
            torch.cuda.synchronize(device)
        self._launches[call] = min(launch, self._launches.get(call, launch))  # the first launch compiles
        return start.elapsed_time(end) / 1e3, [launch]
