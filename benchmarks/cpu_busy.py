"""Time Stem on a CPU against torch's dense attention, alone and beside busy processes.

    python benchmarks/cpu_busy.py [--lengths 8192,32768] [--threads 2] [--busy 2] [--rounds 5] [--json FILE]

8 query heads, 2 key/value heads of 64, fp32, random inputs. Both run in turn, in an order drawn anew each round; what counts is
the ratio of their medians. A busy process multiplies matrices on one thread until it is stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from stem_attention import Stem, select_blocks, stem_attention
from stem_attention.testing import make_qkv


def main() -> None:
    """Run both settings for each length and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="8192,32768")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--busy", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts = {"torch": torch.__version__, "machine": platform.machine(), "threads": options.threads}
    rows = [
        row
        for length in map(int, options.lengths.split(","))
        for busy in (0, options.busy)
        for row in measure(length, busy, options.rounds)
    ]
    if options.json:
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


def measure(length: int, busy: int, rounds: int) -> list[dict[str, object]]:
    """Ratios of one length beside ``busy`` processes."""
    q, k, v = make_qkv(1, length, length, 8, 2, 64)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    policies = {"mass": None, "stem": Stem()}
    runs: dict[str, Callable[[], object]] = {
        "dense": lambda: torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
    }
    for name, policy in policies.items():
        runs[name] = lambda policy=policy: stem_attention(q, k, v, policy=policy, dense_below=0)  # type: ignore[misc]
    with busy_processes(busy):
        times = in_turn(runs, rounds)
    rows: list[dict[str, object]] = []
    for name, policy in policies.items():
        density = round(select_blocks(q, k, v, policy=policy).density(), 4)
        taken = {"dense_s": round(times["dense"], 4), "stem_s": round(times[name], 4)}
        ratio = round(times["dense"] / times[name], 3)
        rows.append({"tokens": length, "busy": busy, "policy": name, "density": density, **taken, "ratio": ratio})
        print(*(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    return rows


def in_turn(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, after one run that does not count."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name in random.sample(list(runs), len(runs)):
            begin = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep so many processes multiplying matrices meanwhile."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=multiply_for_ever, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    time.sleep(5 if count else 0)  # until they have imported torch
    try:
        yield
    finally:
        for process in processes:
            process.terminate()


def multiply_for_ever() -> None:
    """Keep one core busy."""
    torch.set_num_threads(1)
    x = torch.rand(512, 512)
    while True:
        x = (x @ x).softmax(-1)


if __name__ == "__main__":
    main()
