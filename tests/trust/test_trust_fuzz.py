"""Any shape, dtype, layout, config and list, by chance: against fp64 and the reference. testing.soak runs thousands more."""

from dataclasses import replace
from itertools import count
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import stem_attention as sa
from stem_attention.testing import make_qkv
from stem_attention.testing.problems import KINDS, Problem, Space, draw_problem
from stem_attention.testing.soak import space_for
from stem_attention.testing.trial import Place, run_problem

from .common import INTERPRETED, Rig

TINY = Space(
    head_dims=(16, 24), groups=(1, 2, 7), block_sizes=(16, 32), dtypes=("float32", "float16"), page_sizes=(1, 16, 20),
    longest=120, work=1 << 11,
)  # fmt: skip
SMALL = replace(Space(), work=1 << 15)
seeds = st.integers(0, 1 << 32)


def drawn(seed: int, space: Space, kind: str) -> Problem:
    """A problem of one kind; of several sequences only packed ones have different lengths."""
    for draw in map(Random, count(seed)):
        problem = draw_problem(draw, space)
        if problem.kind == kind:
            return problem
    raise AssertionError("every kind is drawn sooner or later")


def space_of(rig: Rig) -> Space:
    if rig.device == "cuda":
        return space_for(rig.backend, 1)
    return TINY if INTERPRETED else SMALL


@pytest.mark.parametrize("kind", KINDS)
def test_any_problem_is_solved(kind, rig):
    @settings(max_examples=3 if INTERPRETED else 15, suppress_health_check=list(HealthCheck))
    @given(seeds)
    def solve(seed):
        problem = drawn(seed, space_of(rig), kind)
        assert run_problem(problem, Place(rig.backend, rig.device)) == [], problem

    solve()


@pytest.mark.skipif(INTERPRETED, reason="compares the two eager backends")
@settings(max_examples=25)
@given(seeds)
def test_the_fast_scores_choose_what_the_slow_ones_choose_in_fp64(seed):
    problem = drawn(seed, replace(Space(), work=1 << 13), "whole")
    (q_len, kv_len), heads = problem.lengths[0], problem.kv_heads * problem.group
    q, k, v = make_qkv(1, q_len, kv_len, heads, problem.kv_heads, problem.head_dim, torch.float64, seed=seed)
    fast, slow = (
        sa.select_blocks(q, k, v, config=problem.config, prompt_len=kv_len + problem.prompt_extra, backend=name)
        for name in ("torch", "reference")
    )
    assert torch.equal(fast.to_mask(), slow.to_mask())
