"""Serving: chunks of many prompts from a paged cache, Stem against dense attention on contiguous keys."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stem_attention.api import dense_limit, select_blocks
from stem_attention.config import StemConfig
from stem_attention.evaluation.bench_checks import Check
from stem_attention.evaluation.bench_peers import admit
from stem_attention.evaluation.bench_serving_batches import Load, Scenario, build_load
from stem_attention.evaluation.bench_serving_dense import WHOLE, dense_runs
from stem_attention.evaluation.bench_shapes import Shape
from stem_attention.evaluation.bench_suites import STEM, WrongResultError
from stem_attention.evaluation.bench_timing import Times, time_in_turn
from stem_attention.policies.dense import keep_everything
from stem_attention.selection import BlockSelection
from stem_attention.testing import error_against_sdpa, token_mask
from stem_attention.varlen import stem_attention_varlen

_CHECKED_CHUNKS = 3


@dataclass(frozen=True)
class ServingResult:
    """What one scenario gave.

    Attributes:
        scenario: The scenario.
        check: Stem's check, passed.
        density: Kept share of the causal block pairs.
        times: Every timed round of every contestant: the attention of all steps.
        left_out: Dense contestants that were not timed, and why.
    """

    scenario: Scenario
    check: Check
    density: float
    times: dict[str, Times]
    left_out: dict[str, str]

    @property
    def medians(self) -> dict[str, float]:
        """Median seconds of every contestant."""
        return {name: statistics.median(times.work) for name, times in self.times.items()}

    @property
    def ratios(self) -> dict[str, float]:
        """Time of the fastest dense attention of the same chunks over Stem's; beside it that of prompts in one piece."""
        medians = self.medians
        chunked = [seconds for name, seconds in medians.items() if name not in (STEM, WHOLE)]
        ratios = {"ratio": min(chunked) / medians[STEM]} if chunked else {}
        return {**ratios, "ratio to one piece": medians[WHOLE] / medians[STEM]} if WHOLE in medians else ratios


def run_serving(
    scenario: Scenario, shape: Shape, config: StemConfig, *, repeats: int, seed: int, dense: bool, on_step: Callable[[], None]
) -> ServingResult:
    """Check Stem on random inputs, then time it and dense attention in turn.

    Args:
        scenario: What to serve.
        shape: Heads, dtype and device; its length is not used.
        config: Stem's config, its ``dense_below`` included.
        repeats: Timed rounds.
        seed: Of the inputs and of the chunks that are checked.
        dense: Whether dense attention runs too.
        on_step: Called after the checks and after every round.

    Raises:
        WrongResultError: Stem's result is wrong.
    """
    load = build_load(scenario, shape, seed)
    limit = dense_limit(device=shape.device, dtype=shape.dtype, head_dim=shape.head_dim, config=config)

    def stem() -> list[Tensor]:
        return [
            stem_attention_varlen(
                step.q, load.key_cache, load.value_cache, step.query_start_loc, step.seq_starts,
                int(step.query_start_loc.diff().max()), int(step.seq_starts.diff().max()),
                page_table=step.block_table, prompt_lens=step.prompt_lens, config=config,
            )
            for step in load.steps
        ]  # fmt: skip

    checked = _check(stem(), load, config, limit, seed)
    problem = checked.problem(shape.dtype)
    if problem is not None:
        raise WrongResultError(f"wrong result for {scenario.name}: {problem}")
    peers, left_out = admit(
        dense_runs(load, scenario) if dense else {},
        lambda outs: _check(outs, load, config, None, seed).problem(shape.dtype),
    )
    on_step()
    times = time_in_turn({**peers, STEM: stem}, shape.device, repeats, on_step)
    return ServingResult(scenario, checked, scenario.density(config, limit), times, left_out)


def _check(outs: list[Tensor], load: Load, config: StemConfig, limit: int | None, seed: int) -> Check:
    """Compute query blocks of the longest and of a few random chunks again in fp64, in every head.

    Of each chunk the last block, which may belong to a prompt's dense tail, and a random one. ``limit``: prompts of fewer
    tokens are to be dense; None: all are.
    """
    draw = torch.Generator().manual_seed(seed)
    places = [(step, out, c) for step, out in zip(load.steps, outs, strict=True) for c in range(len(step.chunks))]
    order = torch.randperm(len(places), generator=draw).tolist()
    longest = max(range(len(places)), key=lambda i: places[i][0].chunks[places[i][2]].high)
    errors, rows = [], 0
    for step, out, c in (places[i] for i in sorted({longest, *order[: _CHECKED_CHUNKS - 1]})):
        (low, high), chunk, prompt = step.query_start_loc[c : c + 2].tolist(), step.chunks[c], step.prompt_lens[c]
        q, k, v = step.q[None, low:high], *(x[chunk.request][None, : chunk.high] for x in (load.keys, load.values))
        if limit is None or prompt < limit:
            selection = keep_everything(q, k, config.block_size)
        else:
            selection = select_blocks(q, k, v, config=config, prompt_len=prompt)
        for row in {int(torch.randint(selection.rows, (1,), generator=draw)), selection.rows - 1}:
            errors += _head_errors(out[None, low:high], q, k, v, *_one_row(selection, row))
            rows += 1
    error, dense_error = torch.tensor(errors, dtype=torch.float64).amax(0).tolist()  # keeps a NaN, as Python's max does not
    return Check(rows, error, dense_error, 0.0)


def _one_row(selection: BlockSelection, row: int) -> tuple[BlockSelection, slice]:
    """A query block of a selection, with keys up to its end, and where its queries lie among the selection's."""
    start, block = selection.kv_len - selection.q_len, selection.first_row + row
    low = max(block * selection.block_size, start)
    high = min((block + 1) * selection.block_size, selection.kv_len)
    indices, counts = (x[:, :, row : row + 1] for x in (selection.indices, selection.counts))
    return BlockSelection(indices, counts, selection.block_size, high - low, high), slice(low - start, high - start)


def _head_errors(out: Tensor, q: Tensor, k: Tensor, v: Tensor, row: BlockSelection, at: slice) -> list[tuple[float, float]]:
    """Worst relative row errors of ``out`` and of SDPA in every head; one at a time, for at 128K tokens fp64 needs room."""
    group, errors, keys = q.shape[2] // k.shape[2], [], slice(0, row.kv_len)
    for head in range(q.shape[2]):
        query, key = slice(head, head + 1), slice(head // group, head // group + 1)
        alone = BlockSelection(row.indices[:, query], row.counts[:, query], row.block_size, row.q_len, row.kv_len)
        mine, queries, seen_k, seen_v = out[:, at, query], q[:, at, query], k[:, keys, key], v[:, keys, key]
        errors.append(error_against_sdpa(mine, queries, seen_k, seen_v, token_mask(alone)))
    return errors
