"""Threads that each run whole units of work, with one thread inside every operation."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Barrier
from typing import TypeVar

import torch

_T = TypeVar("_T")


def run_all(work: Callable[[_T], None], units: Sequence[_T], device: torch.device) -> None:
    """Run ``work`` on units that do not depend on one another, on a CPU by as many threads as torch has; raise their errors."""
    threads = min(torch.get_num_threads(), len(units)) if device.type == "cpu" else 1
    if threads < 2:
        for unit in units:
            work(unit)
        return
    inference = torch.is_inference_mode_enabled()  # a thread starts without the modes of the one that starts it

    def one(unit: _T) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            work(unit)

    for _ in _pool(torch.get_num_threads()).map(one, units):
        pass


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads for good: starting them costs more than a small call."""
    ready = Barrier(threads + 1)

    def start() -> None:
        torch.set_num_threads(1)
        ready.wait()

    pool = ThreadPoolExecutor(threads, "stem-attention", start)
    for _ in range(threads):  # a pool starts a thread for each of its first tasks
        pool.submit(int)
    ready.wait()
    torch.set_num_threads(threads)  # each thread has set its own number, and the one that later threads begin with
    return pool


# A forked child has none of its parent's threads, and would wait for them for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
