"""Three comparisons on one layer: the whole attention, the attention over given lists, and the choice of the blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from stem_attention import BlockSelection, Policy, block_sparse_attention, select_blocks, stem_attention
from stem_evals.bench.checks import check, dense_problem, difference_problem, differing_blocks, sparse_problem
from stem_evals.bench.peers import EAGER, FLEX, STEM, admit, dense_peers, flex_peer
from stem_evals.bench.setup import Setup
from stem_evals.bench.timing import Call, medians, round_count, time_in_turn

# Dense attention at a million tokens takes half a minute a call on the fastest card and says nothing new.
LONGEST_DENSE = 262144


@dataclass(frozen=True)
class _Problem:
    setup: Setup
    qkv: list[Tensor]
    policy: Policy
    selection: BlockSelection

    def dense(self) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
        """Dense peers that are right, and why others are left out."""
        peers, length = dense_peers(*self.qkv), self.selection.kv_len
        if not self.setup.dense or length > LONGEST_DENSE:
            return {}, dict.fromkeys(peers, f"not run beyond {LONGEST_DENSE} tokens" if self.setup.dense else "not asked for")
        return admit(peers, lambda out: dense_problem(out, *self.qkv, self.policy.block_size))


@dataclass(frozen=True)
class _Contest:
    """Who runs and who does not, the ratios and shares read off the medians, and the operations of those with a rate."""

    calls: Mapping[str, Call]
    left_out: dict[str, str]
    measure: Callable[[dict[str, float]], dict[str, float]]
    work: dict[str, float] = field(default_factory=dict)


def run_layers(suite: str, setup: Setup) -> dict[str, Any]:
    """Check Stem on random inputs of every length, then time it and its peers in turn.

    Returns:
        Plain JSON types: facts, and of each length the check, the kept share of the causal blocks, seconds of every timed
        round and their medians, the suite's measures (``ratio``: how many times faster Stem is), rates, and who was left out
        and why.

    Raises:
        WrongResultError: Stem's result is wrong.
    """
    return {"suite": suite, **setup.facts(), "results": [_time_layer(suite, setup, length) for length in setup.lengths]}


def _time_layer(suite: str, setup: Setup, length: int) -> dict[str, Any]:
    on_step = setup.start(f"{length} tokens", 1 + round_count(setup.device, setup.rounds))
    qkv, policy = setup.inputs(length), setup.spec.at(length)
    checked = check(*qkv, policy, setup.seed)
    checked.confirm(setup.dtype, f"{length} tokens")
    selection = select_blocks(*qkv, policy=policy)
    contest = _SUITES[suite](_Problem(setup, qkv, policy, selection))
    on_step()
    times = time_in_turn(contest.calls, setup.device, setup.rounds, on_step)
    middle = medians(times)
    return {
        "length": length,
        "check": asdict(checked),
        "density": selection.density(),
        "seconds": {name: taken.work for name, taken in times.items()},
        "medians": middle,
        "launch_medians": {name: float(np.median(taken.launch)) for name, taken in times.items() if taken.launch},
        "measures": contest.measure(middle),
        "tflops": {name: work / middle[name] / 1e12 for name, work in contest.work.items()},
        "left_out": contest.left_out,
    }


def _attention(problem: _Problem) -> _Contest:
    peers, left_out = problem.dense()
    whole = partial(stem_attention, *problem.qkv, policy=problem.policy)
    ours: dict[str, Call] = {
        "selection": partial(select_blocks, *problem.qkv, policy=problem.policy),
        "attention": partial(block_sparse_attention, *problem.qkv, problem.selection),
        "whole": partial(whole, dense_below=0),
        "default": partial(whole, dense_below=problem.setup.dense_below),
    }

    def measure(middle: dict[str, float]) -> dict[str, float]:
        share = middle["selection"] / (middle["selection"] + middle["attention"])
        ratios = {**_ratio("ratio", peers, "whole", middle), **_ratio("default ratio", peers, "default", middle)}
        return {**ratios, "selection share": share}

    return _Contest({**peers, **ours}, left_out, measure)


def _kernel(problem: _Problem) -> _Contest:
    dense, left_out = problem.dense()
    over = *problem.qkv, problem.selection
    ours = partial(block_sparse_attention, *over)
    flex, flex_left_out = admit({FLEX: lambda: flex_peer(*over)}, lambda out: sparse_problem(out, *over))
    grid, counts = problem.selection.grid, problem.selection.counts
    block_flops = 4.0 * problem.qkv[0].shape[3] * grid.block_size**2  # two products
    # The diagonal block counts half, as its upper triangle is masked.
    everything = block_flops * counts.shape[1] * grid.key_blocks**2 / 2
    kept = block_flops * (int(counts.sum()) - counts.numel() / 2)

    def measure(middle: dict[str, float]) -> dict[str, float]:
        return {**_ratio("ratio", flex, STEM, middle), **_ratio("dense ratio", dense, STEM, middle)}

    work = {**dict.fromkeys(dense, everything), **dict.fromkeys((*flex, STEM), kept)}
    return _Contest({**dense, **flex, STEM: ours}, {**left_out, **flex_left_out}, measure, work)


def _selection(problem: _Problem) -> _Contest:
    peer = {EAGER: lambda: partial(problem.policy, *problem.qkv)}
    differing: dict[str, float] = {}

    def wrong(theirs: BlockSelection) -> str | None:
        differing["differing blocks"] = differing_blocks(problem.selection, theirs)
        return difference_problem(differing["differing blocks"])

    peers, left_out = admit(peer, wrong)
    ours = partial(select_blocks, *problem.qkv, policy=problem.policy)
    return _Contest({**peers, STEM: ours}, left_out, lambda middle: {**_ratio("ratio", peers, STEM, middle), **differing})


_SUITES: dict[str, Callable[[_Problem], _Contest]] = {"attention": _attention, "kernel": _kernel, "selection": _selection}


def _ratio(name: str, rivals: Iterable[str], ours: str, middle: dict[str, float]) -> dict[str, float]:
    """How many times faster ``ours`` is than the fastest of ``rivals``; nothing when there is no rival."""
    times = [middle[rival] for rival in rivals]
    return {name: min(times) / middle[ours]} if times else {}
