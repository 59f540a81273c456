"""Thousands of random problems against the reference, with an eye on memory: ``python -m stem_attention.testing.soak``.

Each worker is a process of its own with problems of its own. A problem is drawn from the seed, the worker and its number
alone, so that ``--only WORKER:NUMBER`` runs a failed one again.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import platform
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch

from stem_attention.testing.problems import Problem, Space, draw_problem
from stem_attention.testing.trial import Place, run_problem

# A worker's first half fills caches of compiled kernels, budgets and memory; from then on nothing may grow.
_SETTLED = 0.5
_SAMPLES = 30
_ALLOWED_GROWTH = 64 << 20
_MOST_REPORTED = 20


def space_for(backend: str, worker: int) -> Space:
    """Problems of a worker. On a GPU each shape of a kernel is compiled: a worker keeps to a few, and all have them all."""
    if backend not in ("triton", "hopper"):
        return Space()
    dims = (64, 128, 256) if backend == "hopper" else (128, 80, 64, 256, 96, 16, 40, 192)
    return Space(
        head_dims=(dims[worker // 2 % len(dims)],),
        groups=((4, 1, 7, 16, 8)[worker % 5],),
        block_sizes=(64,) if worker % 2 else (128,),
        dtypes=("float16",) if worker % 3 == 2 else ("bfloat16",),
        page_sizes=(16, 64) if worker // 2 % 2 else (64, 128),
        work=1 << 23,
        presets=True,
    )


def problem_of(seed: int, worker: int, number: int, space: Space) -> Problem:
    """The ``number``-th problem of a worker."""
    return draw_problem(Random(f"{seed}:{worker}:{number}"), space)


def soak(shapes: int, backend: str, device: str, seed: int, worker: int = 0, *, quiet: bool = True) -> dict[str, Any]:
    """Run ``shapes`` problems. Returns counts, failed problems and memory, as plain JSON types."""
    torch.set_num_threads(1)
    space, memory, failed, kinds = space_for(backend, worker), [], [], Counter[str]()
    begun = time.monotonic()
    for number in range(shapes):
        problem = problem_of(seed, worker, number, space)
        faults = _faults(problem, Place(backend, device, poisoned=number % 2 == 0))
        kinds[problem.kind] += 1
        if faults:
            failed.append({"only": f"{worker}:{number}", "faults": faults, "problem": problem.to_json()})
            print(f"worker {worker}, problem {number}: {faults[0]}", file=sys.stderr)
        if number % max(1, shapes // _SAMPLES) == 0:
            memory.append(_memory(device))
            if not quiet:
                print(f"{number} of {shapes}, {len(failed)} failed, {time.monotonic() - begun:.0f} s", file=sys.stderr)
    settled = memory[int(len(memory) * _SETTLED) :]
    third = max(1, len(settled) // 3)
    begins, ends = ({name: median(x[name] for x in part) for name in memory[0]} for part in (settled[:third], settled[-third:]))
    return {
        "shapes": shapes, "kinds": dict(kinds), "failed": len(failed), "first_failures": failed[:_MOST_REPORTED],
        "memory_growth_bytes": {name: round(ends[name] - begins[name]) for name in ends},
        "memory": memory,
        "seconds": round(time.monotonic() - begun, 1),
    }  # fmt: skip


def _faults(problem: Problem, place: Place) -> list[str]:
    try:
        return run_problem(problem, place)
    except (RuntimeError, ValueError, IndexError, ArithmeticError) as error:  # what a problem raises is a finding too
        return [f"{type(error).__name__}: {error}"]


def _memory(device: str) -> dict[str, int]:
    """Bytes of live tensors on the device, and of the process."""
    gc.collect()
    resident = Path("/proc/self/statm")
    pages = int(resident.read_text().split()[1]) if resident.exists() else 0
    sizes = {"process": pages * 4096}
    if device != "cpu":
        sizes["device"] = torch.cuda.memory_allocated()
    return sizes


def _worker(arguments: tuple[int, str, str, int, int]) -> dict[str, Any]:
    return soak(*arguments, quiet=arguments[4] != 0)


def run_workers(shapes: int, backend: str, device: str, seed: int, workers: int) -> dict[str, Any]:
    """:func:`soak` in several processes at once, and their results together."""
    each = -(-shapes // workers)
    jobs = [(each, backend, device, seed, worker) for worker in range(workers)]
    if workers == 1:
        parts = [_worker(jobs[0])]
    else:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            parts = pool.map(_worker, jobs, chunksize=1)
    names = parts[0]["memory_growth_bytes"]
    return {
        "backend": backend,
        "device": torch.cuda.get_device_name() if device != "cpu" else platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seed": seed,
        "workers": workers,
        "shapes": sum(part["shapes"] for part in parts),
        "kinds": dict(sum((Counter(part["kinds"]) for part in parts), Counter[str]())),
        "failed": sum(part["failed"] for part in parts),
        "first_failures": [failure for part in parts for failure in part["first_failures"]][:_MOST_REPORTED],
        "memory_growth_bytes": {name: max(part["memory_growth_bytes"][name] for part in parts) for name in names},
        "memory": [part["memory"] for part in parts],
        "seconds": max(part["seconds"] for part in parts),
    }


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns 0 when every problem was solved and memory stayed flat."""
    parser = argparse.ArgumentParser(prog="python -m stem_attention.testing.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=int, default=10000, help="problems in all")
    parser.add_argument("--backend", default="torch", help="torch, reference, triton or hopper")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--only", metavar="WORKER:NUMBER", help="run a single problem again, and print it")
    asked = parser.parse_args(arguments)
    device = "cuda" if asked.backend in ("triton", "hopper") else "cpu"
    if asked.only:
        worker, number = map(int, asked.only.split(":"))
        problem = problem_of(asked.seed, worker, number, space_for(asked.backend, worker))
        faults = run_problem(problem, Place(asked.backend, device, poisoned=number % 2 == 0))
        print(json.dumps({"problem": problem.to_json(), "faults": faults}, indent=1))
        return int(bool(faults))
    result = run_workers(asked.shapes, asked.backend, device, asked.seed, asked.workers)
    text = json.dumps(result, indent=1)
    if asked.json:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(text + "\n")
    print(text)
    flat = all(growth <= _ALLOWED_GROWTH for growth in result["memory_growth_bytes"].values())
    return int(result["failed"] > 0 or not flat)


if __name__ == "__main__":
    sys.exit(main())
