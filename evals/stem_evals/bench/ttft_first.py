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

import torch

from stem_attention.cli.errors import UserError
from stem_attention.policies import parse_spec
from stem_evals.bench.peers import STEM
from stem_evals.bench.setup import Setup
from stem_evals.bench.ttft_contestants import contestants
from stem_evals.bench.ttft_models import ARCHITECTURES, build_model, prefill_seconds, random_tokens

_LAYERS = 2


def first_calls(setup: Setup, model: str, dense: str | None) -> dict[str, dict[str, float]]:
    """Time Stem with an empty and with a filled Triton cache, and a dense contestant, if there is one.

    Returns:
        Seconds of a new process's ``first`` prefill and of its ``second``.

    Raises:
        UserError: A process ended badly; the message ends with the last line that it wrote.
    """
    limit = setup.explained(setup.lengths[0]).dense_below or 0
    length = next((length for length in setup.lengths if length >= limit), limit)  # a dense call loads no kernel of ours
    found, runs = {}, {f"{STEM}, empty cache": STEM, f"{STEM}, filled cache": STEM} | ({dense: dense} if dense else {})
    on_step = setup.start("first calls of new processes", len(runs))
    with tempfile.TemporaryDirectory() as cache:
        for name, contestant in runs.items():
            dtype = str(setup.dtype).removeprefix("torch.")
            job = [model, length, dtype, str(setup.device), contestant, setup.spec.text, setup.dense_below, setup.seed]
            environment = {**os.environ, "TRITON_CACHE_DIR": cache} if contestant == STEM else None
            command = [sys.executable, "-m", __name__, json.dumps(job)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
                raise UserError(f"--first-call: a measuring process failed: {last}; try without the option")
            found[name] = json.loads(done.stdout.splitlines()[-1])
            on_step()
    return found


def measure(
    model: str, length: int, dtype: str, device: str, contestant: str, spec: str, dense_below: int | None, seed: int
) -> dict[str, float]:
    """Build the model and time two prefills, in this process."""
    where = torch.device(device)
    built = build_model(ARCHITECTURES[model], getattr(torch, dtype), where, seed, _LAYERS)
    tokens = random_tokens(built, length, seed)
    entrants = contestants(where, parse_spec(spec).at(length), dense_below)
    (entrant,) = (entrant for entrant in entrants if entrant.name == contestant)
    with entrant.running(built):
        return {"first": prefill_seconds(built, tokens), "second": prefill_seconds(built, tokens)}


if __name__ == "__main__":
    print(json.dumps(measure(*json.loads(sys.argv[1]))))
