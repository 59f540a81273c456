"""The clock. Contestants run in turn, so that a machine that slows down or heats up does so for all of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import torch

Call = Callable[[], object]

# The cache is cleared again and again until the call has surely been launched, so that an event pair times the GPU's work
# alone, as in a model whose queue never runs dry. No GPU clears Triton's 256 MB faster than this.
_LEAST_CLEAR_SECONDS = 25e-6
_MOST_CLEARS = 400
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


def medians(times: Mapping[str, Times]) -> dict[str, float]:
    """Return the median seconds of work by name."""
    return {name: float(np.median(taken.work)) for name, taken in times.items()}


def round_count(device: torch.device, repeats: int) -> int:
    """Count the rounds that :func:`time_in_turn` runs, untimed ones included."""
    return repeats + (_GPU_WARM_UP if device.type == "cuda" else _WARM_UP)


def time_in_turn(
    calls: Mapping[str, Call], device: torch.device, repeats: int, on_round: Callable[[], None]
) -> dict[str, Times]:
    """Run every call once per round, in an order drawn anew for every round, the same in every run.

    Whoever follows a large call finds a hot card with a lower clock, who follows a small one a rested card: nobody may always
    follow the same one. ``on_round`` is called after every round.
    """
    names, rounds, draw = list(calls), round_count(device, repeats), random.Random(0)
    times = {name: Times() for name in names}
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        clock = _GpuClock() if device.type == "cuda" else lambda call: (host_seconds(device, call), [])
        for current in range(rounds):
            draw.shuffle(names)
            for name in names:
                work, launch = clock(calls[name])
                if current >= rounds - repeats:
                    times[name].work.append(work)
                    times[name].launch.extend(launch)
            on_round()
    return times


def host_seconds(device: torch.device, call: Call) -> float:
    """Time a call and what it gives an accelerator to do, by the host's clock."""
    wait(device)
    start = perf_counter()
    call()
    wait(device)
    return perf_counter() - start


def wait(device: torch.device) -> None:
    """Wait for what an accelerator has been given to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class _GpuClock:
    """The current GPU's own time of a call with a cold cache, by the means of ``triton.testing.do_bench``."""

    def __init__(self) -> None:
        from triton.runtime import driver  # which a CPU does not need

        self._driver: Any = driver.active
        self._cache = self._driver.get_empty_cache_for_benchmark()
        self._launches: dict[Call, float] = {}

    def __call__(self, call: Call) -> tuple[float, list[float]]:
        device = self._driver.get_device_interface()
        start, end = (device.Event(enable_timing=True) for _ in range(2))
        for _ in range(min(_MOST_CLEARS, 1 + int(2 * self._launches.get(call, 0.0) / _LEAST_CLEAR_SECONDS))):
            self._driver.clear_cache(self._cache)
        start.record()
        began = perf_counter()
        call()
        launch = perf_counter() - began
        end.record()
        device.synchronize()
        self._launches[call] = min(launch, self._launches.get(call, launch))  # the first launch compiles
        return start.elapsed_time(end) / 1e3, [launch]
