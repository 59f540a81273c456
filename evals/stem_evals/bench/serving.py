"""Serving: chunks of many prompts from a paged cache, Stem against dense attention on contiguous keys."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stem_attention import BlockSelection, Policy, select_blocks, stem_attention_varlen
from stem_attention.policies import Dense
from stem_evals.bench.checks import Check, row_errors, worst
from stem_evals.bench.peers import STEM, admit
from stem_evals.bench.serving_batches import PAGE_SIZE, Part, Scenario, Step, build_steps, chunked_prefill, mixed_step
from stem_evals.bench.serving_dense import dense_runs
from stem_evals.bench.setup import Setup
from stem_evals.bench.timing import medians, round_count, time_in_turn

_CHECKED_CHUNKS = 3


def run_serving(setup: Setup) -> dict[str, Any]:
    """Check Stem on random inputs, then time the attention of all steps, Stem's and dense, in turn.

    Every length makes two scenarios: eight prompts of it in four chunks each, and a step of 64 prompts of up to four times it.

    Returns:
        Plain JSON types: facts, and of each scenario the check, the kept share of the causal blocks, seconds of every timed
        round and their medians, the ratio to the fastest dense attention, and who was left out and why.

    Raises:
        WrongResultError: Stem's result is wrong.
    """
    results = [
        _time_scenario(scenario, length, setup)
        for length in setup.lengths
        for scenario in (chunked_prefill(length), mixed_step(4 * length, seed=setup.seed))
    ]
    return {"suite": "serving", "page_size": PAGE_SIZE, **setup.facts(), "results": results}


def _time_scenario(scenario: Scenario, length: int, setup: Setup) -> dict[str, Any]:
    policy, limit = setup.spec.at(length), setup.explained(length).dense_below
    on_step = setup.start(scenario.name, 1 + round_count(setup.device, setup.rounds))
    steps = build_steps(scenario, setup)
    ours = partial(run_stem, steps, policy, setup.dense_below)
    checked = check_steps(ours(), steps, policy, limit, setup.seed)
    checked.confirm(setup.dtype, scenario.name)
    peers, left_out = admit(
        dense_runs(steps) if setup.dense else {},
        lambda outs: check_steps(outs, steps, policy, None, setup.seed).problem(setup.dtype),
    )
    on_step()
    times = time_in_turn({**peers, STEM: ours}, setup.device, setup.rounds, on_step)
    middle = medians(times)
    return {
        "scenario": scenario.name,
        "prompts": list(scenario.prompts),
        "tokens": sum(part.q.shape[1] for step in steps for part in step.parts),
        "steps": len(steps),
        "check": asdict(checked),
        "density": density(steps, policy, limit),
        "seconds": {name: taken.work for name, taken in times.items()},
        "medians": middle,
        "ratios": {"ratio": min(middle[name] for name in peers) / middle[STEM]} if peers else {},
        "left_out": left_out,
    }


def run_stem(steps: list[Step], policy: Policy, dense_below: int | None) -> list[Tensor]:
    """Read all steps from the paged cache; returns every step's output, ``(tokens, heads, dim)``."""
    return [
        stem_attention_varlen(
            *step.packed, page_table=step.page_table, prompt_lens=[part.prompt_len for part in step.parts], policy=policy,
            dense_below=dense_below,
        )
        for step in steps
    ]  # fmt: skip


def density(steps: list[Step], policy: Policy, limit: int | None) -> float:
    """Return the kept share of the causal block pairs of all chunks; prompts under ``limit`` tokens keep all."""
    chosen = [_chosen(part, policy, limit) for step in steps for part in step.parts]
    pairs = [selection.grid.causal_pairs for selection in chosen]
    return sum(one.density() * count for one, count in zip(chosen, pairs, strict=True)) / sum(pairs)


def check_steps(outs: list[Tensor], steps: list[Step], policy: Policy, limit: int | None, seed: int) -> Check:
    """Compute query blocks of the longest and of a few random chunks again in fp64, in every head.

    Of each chunk the last block, which may belong to a prompt's tail, and a random one. ``limit``: prompts of fewer tokens
    are to be dense; None: all are.
    """
    draw = torch.Generator().manual_seed(seed)
    parts = [part for step in steps for part in step.parts]
    found = torch.split(torch.cat(outs), [part.q.shape[1] for part in parts])
    longest = max(range(len(parts)), key=lambda i: parts[i].k.shape[1])
    drawn = torch.randperm(len(parts), generator=draw).tolist()[: _CHECKED_CHUNKS - 1]
    errors, rows = list[tuple[float, float]](), 0
    for i in sorted({longest, *drawn}):
        part, selection = parts[i], _chosen(parts[i], policy, limit)
        for row in {int(torch.randint(selection.rows, (1,), generator=draw)), selection.rows - 1}:
            errors += row_errors(found[i][None], part.q, part.k, part.v, selection, row)
            rows += 1
    return Check(rows, *worst(errors))


def _chosen(part: Part, policy: Policy, limit: int | None) -> BlockSelection:
    """Describe what a chunk is to attend to."""
    if limit is None or part.prompt_len < limit:
        return Dense(block_size=policy.block_size)(part.q, part.k, part.v)
    return select_blocks(part.q, part.k, part.v, policy=policy, prompt_len=part.prompt_len)
