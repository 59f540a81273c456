"""The first call of a new process: what loading and compiling kernels adds to a prefill.

Each measurement is a process of its own, with a model of the right shapes and few layers: kernels are compiled and loaded
once, however many layers there are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass

import torch

from stem_attention.config import StemConfig
from stem_attention.evaluation.bench_ttft import prefill_seconds
from stem_attention.evaluation.bench_ttft_contestants import STEM, contestants
from stem_attention.evaluation.bench_ttft_models import ARCHITECTURES, build_model, random_tokens

_LAYERS = 2


@dataclass(frozen=True)
class FirstCall:
    """Seconds of a new process's first prefill, and of its second."""

    first: float
    second: float


@dataclass(frozen=True)
class Job:
    """What a process measures; it crosses over as JSON."""

    model: str
    length: int
    dtype: str
    device: str
    contestant: str
    config: str
    seed: int


class ProcessError(Exception):
    """A measuring process ended badly; the text is the last line that it wrote."""


def first_calls(job: Job, dense: str | None) -> dict[str, FirstCall]:
    """Stem's first call with an empty and with a filled Triton cache, and a dense contestant's, if there is one."""
    with tempfile.TemporaryDirectory() as cache:
        empty = {**os.environ, "TRITON_CACHE_DIR": cache}
        found = {f"{STEM}, empty cache": _run(job, empty), f"{STEM}, filled cache": _run(job, empty)}
    return found if dense is None else {dense: _run(Job(**{**asdict(job), "contestant": dense}), None), **found}


def _run(job: Job, environment: dict[str, str] | None) -> FirstCall:
    command = [sys.executable, "-m", __name__, json.dumps(asdict(job))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ProcessError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return FirstCall(**json.loads(done.stdout.splitlines()[-1]))


def measure(job: Job) -> FirstCall:
    """Build the model and time two prefills, in this process."""
    device = torch.device(job.device)
    model = build_model(ARCHITECTURES[job.model], getattr(torch, job.dtype), device, job.seed, _LAYERS)
    tokens = random_tokens(model, job.length, job.seed)
    (contestant,) = (entrant for entrant in contestants(device, dense=True) if entrant.name == job.contestant)
    with contestant.running(model, StemConfig.from_json(job.config)):
        return FirstCall(prefill_seconds(model, tokens), prefill_seconds(model, tokens))


if __name__ == "__main__":
    print(json.dumps(asdict(measure(Job(**json.loads(sys.argv[1]))))))
