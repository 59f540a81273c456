"""Time to first token: whole models read whole prompts, dense and with Stem, in turn."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from stem_attention import select_blocks
from stem_attention.cli.system import version
from stem_evals.bench.peers import STEM
from stem_evals.bench.setup import Setup
from stem_evals.bench.ttft_contestants import check_contestants, contestants, observe
from stem_evals.bench.ttft_first import first_calls
from stem_evals.bench.ttft_models import ARCHITECTURES, build_model, prefill_seconds, random_tokens

_CHECKED_TOKENS = 1024
_REPEATS = ((32768, 5), (65536, 3))
_LONG_REPEATS = 2


def run_ttft(setup: Setup, name: str, first_call: bool) -> dict[str, Any]:
    """Check everyone on a short prompt, then time an architecture's prefills of every length in turn.

    Returns:
        Plain JSON types: facts, checks, first calls, and of each length the kept share of the causal blocks in the middle
        layer, :func:`ratios`, and every contestant's median and timed seconds, parts and peak bytes.

    Raises:
        WrongResultError: Stem is wrong.
    """
    architecture, policy = ARCHITECTURES[name], setup.spec.at(setup.lengths[0])
    entrants = contestants(setup.device, policy, setup.dense_below, setup.dense)
    dense = next((entrant.name for entrant in entrants if entrant.name != STEM), None)
    calls = first_calls(setup, name, dense) if first_call else {}
    on_step = setup.start(f"{name}: weights, check", 1)
    model = build_model(architecture, setup.dtype, setup.device, setup.seed)
    checks, left_out = check_contestants(model, entrants, random_tokens(model, min(_CHECKED_TOKENS, setup.lengths[0]), 0))
    on_step()
    return {
        "suite": "ttft",
        "model": name,
        "layers": architecture.layers,
        **setup.facts(),
        "transformers": version("transformers"),
        "check": checks,
        "left_out": left_out,
        "first_call": calls,
        "results": [time_prefill(model, list(checks), length, setup) for length in setup.lengths],
    }


def time_prefill(model: PreTrainedModel, names: list[str], length: int, setup: Setup) -> dict[str, Any]:
    """Run everyone's first prefill, one taken apart, and then the timed ones, in an order drawn anew for every round."""
    tokens, policy = random_tokens(model, length, setup.seed), setup.spec.at(length)
    entrants = contestants(setup.device, policy, setup.dense_below, setup.dense)
    running = [entrant for entrant in entrants if entrant.name in names]
    repeats = setup.repeats or next((few for below, few in _REPEATS if length < below), _LONG_REPEATS)
    on_step = setup.start(f"{length} tokens", len(running) * (2 + repeats))
    timings: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    density, middle = 1.0, int(model.config.get_text_config().num_hidden_layers) // 2
    for entrant in list(running):
        try:
            with entrant.running(model):
                first = prefill_seconds(model, tokens)
            on_step()
            apart = observe(model, entrant, tokens, middle)
        except torch.OutOfMemoryError:
            left_out[entrant.name] = "out of memory"
            running.remove(entrant)
            torch.cuda.empty_cache()
            continue
        timings[entrant.name] = {"first": first, "warm": [], "parts": apart.seconds}
        if entrant.policy is not None and length >= (setup.explained(length).dense_below or 0):
            with torch.inference_mode():
                density = select_blocks(*apart.qkv, policy=policy.for_layer(middle)).density()
        del apart  # as large as a layer's attention
        on_step()
    draw, on_gpu = random.Random(0), setup.device.type == "cuda"
    for _ in range(repeats):
        draw.shuffle(running)
        for entrant in running:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(setup.device)
            with entrant.running(model):
                timings[entrant.name]["warm"].append(prefill_seconds(model, tokens))
            timings[entrant.name]["peak"] = torch.cuda.max_memory_allocated(setup.device) if on_gpu else None
            on_step()
    timings = {name: {"seconds": float(np.median(timing["warm"])), **timing} for name, timing in timings.items()}
    return {"length": length, "density": density, "ratios": ratios(timings), "timings": timings, "left_out": left_out}


def ratios(timings: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How many times faster Stem is than the fastest dense contestant: in all, and in attention; and its memory."""
    dense, ours = [timing for name, timing in timings.items() if name != STEM], timings.get(STEM)
    if not dense or ours is None:
        return {}
    best = min(dense, key=lambda timing: float(timing["seconds"]))
    attention = min(timing["parts"]["attention"] for timing in dense) / ours["parts"]["attention"]
    memory = {} if ours["peak"] is None else {"memory": ours["peak"] / best["peak"]}
    return {"total": best["seconds"] / ours["seconds"], "attention": attention, **memory}
