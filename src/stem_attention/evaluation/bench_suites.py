"""Three comparisons: the whole attention, the attention over given lists, and the choice of the blocks."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor

from stem_attention.api import block_sparse_attention, select_blocks, stem_attention
from stem_attention.config import StemConfig
from stem_attention.evaluation.bench_checks import (
    Check,
    check,
    dense_problem,
    differing_blocks,
    selection_problem,
    sparse_problem,
)
from stem_attention.evaluation.bench_peers import FLEX, admit, dense_peers, flex_peer
from stem_attention.evaluation.bench_shapes import Shape, random_inputs
from stem_attention.evaluation.bench_timing import Call, Times, time_in_turn
from stem_attention.policies import policy_of
from stem_attention.selection import BlockSelection

# Dense attention at a million tokens takes half a minute a call on the fastest card and says nothing new.
LONGEST_DENSE = 262144

STEM = "Stem"
EAGER = "eager Stem"


class WrongResultError(Exception):
    """Stem's own result failed its check; there is nothing to time."""


@dataclass(frozen=True)
class Result:
    """What one shape gave.

    Attributes:
        shape: The shape.
        check: Stem's check, passed.
        density: Kept blocks over causal blocks.
        times: Every timed round of every contestant.
        left_out: Peers that were not timed, and why.
        measures: What the suite is about: ratios (how many times faster Stem is), shares, rates.
        work: Floating-point operations of a call, where contestants are compared by their rate.
    """

    shape: Shape
    check: Check
    density: float
    times: dict[str, Times]
    left_out: dict[str, str]
    measures: dict[str, float]
    work: dict[str, float]

    @property
    def medians(self) -> dict[str, float]:
        """Median seconds of every contestant."""
        return _medians(self.times)

    @property
    def launches(self) -> dict[str, float]:
        """Median seconds that a call keeps the host, on a GPU."""
        return {name: statistics.median(times.launch) for name, times in self.times.items() if times.launch}

    @property
    def rates(self) -> dict[str, float]:
        """Operations per second of every contestant whose work is known."""
        return {name: work / self.medians[name] for name, work in self.work.items()}


@dataclass(frozen=True)
class _Problem:
    q: Tensor
    k: Tensor
    v: Tensor
    config: StemConfig
    selection: BlockSelection
    checked: Check
    dense: str | None
    """Why dense peers do not run, or None."""

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v


@dataclass(frozen=True)
class _Contest:
    """Who runs, and what the suite reads off the medians."""

    calls: Mapping[str, Call]
    left_out: dict[str, str]
    measure: Callable[[dict[str, float]], dict[str, float]]
    work: dict[str, float] = field(default_factory=dict)


def run_suite(
    suite: str, shape: Shape, config: StemConfig, *, repeats: int, seed: int, dense: bool, on_step: Callable[[], None]
) -> Result:
    """Check Stem on random inputs, then time it and its peers in turn.

    Args:
        suite: One of :data:`SUITES`.
        shape: The shape.
        config: Stem's config. Blocks are selected whatever its ``dense_below``.
        repeats: Timed rounds.
        seed: Of the inputs.
        dense: Whether dense peers run too, up to :data:`LONGEST_DENSE` tokens.
        on_step: Called after the checks and after every round.

    Raises:
        WrongResultError: Stem's result is wrong.
    """
    q, k, v = random_inputs(shape, seed)
    checked = check(q, k, v, config, seed)
    problem = checked.problem(shape.dtype)
    if problem is not None:
        raise WrongResultError(f"wrong result at {shape.length} tokens: {problem}")
    too_long = f"not run beyond {LONGEST_DENSE} tokens" if shape.length > LONGEST_DENSE else None
    selection = select_blocks(q, k, v, config=config)
    contest = SUITES[suite](_Problem(q, k, v, config, selection, checked, too_long if dense else "not asked for"))
    on_step()
    times = time_in_turn(contest.calls, shape.device, repeats, on_step)
    measures = contest.measure(_medians(times))
    return Result(shape, checked, selection.density(), times, contest.left_out, measures, contest.work)


def _attention(problem: _Problem) -> _Contest:
    peers, left_out = _dense(problem)
    always = replace(problem.config, dense_below=0)
    ours: dict[str, Call] = {
        "selection": partial(select_blocks, *problem.qkv, config=problem.config),
        "attention": partial(block_sparse_attention, *problem.qkv, problem.selection),
        "whole": partial(stem_attention, *problem.qkv, config=always),
        "default": partial(stem_attention, *problem.qkv, config=problem.config),
    }

    def measure(medians: dict[str, float]) -> dict[str, float]:
        share = medians["selection"] / (medians["selection"] + medians["attention"])
        ratios = {**_ratio("ratio", peers, "whole", medians), **_ratio("default ratio", peers, "default", medians)}
        return {**ratios, "selection share": share}

    return _Contest({**peers, **ours}, left_out, measure)


def _kernel(problem: _Problem) -> _Contest:
    dense, left_out = _dense(problem)
    ours = partial(block_sparse_attention, *problem.qkv, problem.selection)
    out = ours()
    flex, flex_left_out = admit(
        {FLEX: lambda: flex_peer(*problem.qkv, problem.selection)}, lambda theirs: sparse_problem(theirs, out, problem.checked)
    )
    kept, everything = _kept_work(problem), _dense_work(problem)
    work = {name: everything if name in dense else kept for name in (*dense, *flex, STEM)}

    def measure(medians: dict[str, float]) -> dict[str, float]:
        return {**_ratio("ratio", flex, STEM, medians), **_ratio("dense ratio", dense, STEM, medians)}

    return _Contest({**dense, **flex, STEM: ours}, {**left_out, **flex_left_out}, measure, work)


def _selection(problem: _Problem) -> _Contest:
    policy = policy_of(problem.config)
    peers, left_out = admit(
        {EAGER: lambda: partial(policy, *problem.qkv)}, lambda theirs: selection_problem(theirs, problem.selection)
    )
    ours = partial(select_blocks, *problem.qkv, config=problem.config)
    differing = {name: differing_blocks(problem.selection, call()) for name, call in peers.items()}

    def measure(medians: dict[str, float]) -> dict[str, float]:
        rate = {"differing blocks": differing[EAGER]} if differing else {}
        return {**_ratio("ratio", peers, STEM, medians), **rate}

    return _Contest({**peers, STEM: ours}, left_out, measure)


SUITES: dict[str, Callable[[_Problem], _Contest]] = {"attention": _attention, "kernel": _kernel, "selection": _selection}


def _dense(problem: _Problem) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    peers = dense_peers(*problem.qkv)
    if problem.dense is not None:
        return {}, dict.fromkeys(peers, problem.dense)
    return admit(peers, lambda out: dense_problem(out, *problem.qkv, problem.config.block_size))


def _medians(times: dict[str, Times]) -> dict[str, float]:
    return {name: statistics.median(taken.work) for name, taken in times.items()}


def _ratio(name: str, rivals: Mapping[str, Any], ours: str, medians: dict[str, float]) -> dict[str, float]:
    """How many times faster ``ours`` is than the fastest of ``rivals``; nothing when there is no rival."""
    return {name: min(medians[rival] for rival in rivals) / medians[ours]} if rivals else {}


def _kept_work(problem: _Problem) -> float:
    """Two products of whole blocks; the diagonal one counts half, as its upper triangle is masked."""
    selection = problem.selection
    pairs = int(selection.counts.sum()) - selection.counts.numel() / 2
    return 4.0 * problem.q.shape[3] * selection.block_size**2 * pairs


def _dense_work(problem: _Problem) -> float:
    blocks, heads = problem.selection.key_blocks, problem.q.shape[2]
    return 4.0 * problem.q.shape[3] * problem.selection.block_size**2 * heads * blocks**2 / 2
