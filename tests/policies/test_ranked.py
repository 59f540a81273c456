"""Policies that rank: Token Position-Decay budgets, worked by hand and as the reference has them, and the choice by score."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_attention import Stem
from stem_attention.backends.reference.select import budget
from stem_attention.policies.ranked import choose

PRESETS = {"default": Stem(), "paper": Stem.paper(), "angelslim": Stem.angelslim()}


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        # 0.2 * NB rounded up, at least 8, up to 128 blocks of 128 tokens = 16384 tokens; 0.1 * NB beyond.
        ("paper", {1: 1, 7: 7, 32: 8, 40: 8, 41: 9, 64: 13, 100: 20, 128: 26, 129: 13, 256: 26, 1024: 103, 1280: 128}),
        # The same, but at least 3, until 128 blocks, then flat at 25.6 until 0.1 * NB overtakes it at 256 blocks.
        ("default", {1: 1, 7: 3, 32: 7, 41: 9, 64: 13, 128: 26, 129: 26, 200: 26, 256: 26, 261: 27, 1024: 103, 1280: 128}),
        # Everything below 56; int(0.2 * NB + 30); int(0.1 * NB) + 30 from 160 on.
        ("angelslim", {1: 1, 55: 55, 56: 41, 64: 42, 100: 50, 159: 61, 160: 46, 256: 55, 1024: 132}),
    ],
)
def test_first_row_budgets_worked_by_hand(preset, expected):
    assert {blocks: PRESETS[preset].first_row_budget(blocks) for blocks in expected} == expected


def test_row_budgets_of_the_paper_worked_by_hand():
    """NB = 64: k_start = 13, and the budget falls by 13 * 0.3 / 64 a row, towards 9.1, each row rounded up."""
    rows = Stem.paper().row_limits(64)
    assert rows[:12] == tuple(range(1, 13))
    # 13 - 0.0609 * I: first at or under 12 at I = 17 (16.4), 11 at 33 (32.8), 10 at 50 (49.2).
    assert rows[12:17] == (13,) * 5
    assert rows[17:33] == (12,) * 16
    assert rows[33:50] == (11,) * 17
    assert rows[50:] == (10,) * 14


def test_row_budgets_of_the_public_code_worked_by_hand():
    """NB = 64: k_start = 42; rows 42..63 fall from 42 to floor(29.4) in 21 equal steps of 0.6; 8 forced blocks on top."""
    two = Stem.angelslim(ratio_short=0.45)  # NB = 58: k_start = 56, and the fall is one of two rows
    assert [two.scored_budget(58, row) for row in (55, 56, 57)] == [56, 56, 39]
    policy = Stem.angelslim()
    assert [policy.scored_budget(64, row) for row in (0, 41, 42, 43, 44, 47, 62, 63)] == [42, 42, 42, 41, 40, 39, 30, 29]
    rows = policy.row_limits(64)
    assert rows[:47] == tuple(range(1, 48))
    # 42 - 0.6 * (I - 42): 39 at 47, so 39 + 8; 37.2 at 50, so 37 + 8; 29.4 at 63, so 29 + 8.
    assert (rows[47], rows[50], rows[63]) == (47, 45, 37)


def test_paper_preset_keeps_a_quarter_of_the_causal_blocks_over_ruler_lengths():
    """Section 4: 25.9 % of the causal blocks, averaged over 4K ... 128K, which is what the paper reports."""
    densities = [Stem.paper().density(thousands * 1024) for thousands in (4, 8, 16, 32, 64, 128)]
    assert sum(densities) / len(densities) == pytest.approx(0.259, abs=5e-4)


POLICIES = st.builds(
    lambda short, share, **fields: Stem(ratio_short=short, ratio_long=short * share, **fields),
    short=st.floats(0.01, 1),
    share=st.floats(0.01, 1),
    block_size=st.sampled_from([16, 64, 128]),
    decay=st.floats(0.01, 1),
    schedule=st.sampled_from(["smooth", "step", "angelslim"]),
    knee_tokens=st.integers(1, 40000),
    min_blocks=st.none() | st.integers(1, 60),
    sink_blocks=st.integers(0, 6),
    local_blocks=st.integers(1, 6),
    tail_blocks=st.integers(0, 3),
    forced=st.sampled_from(["inside", "extra"]),
)
LENGTHS = st.integers(1, 300)


@given(POLICIES, LENGTHS)
@settings(max_examples=150)
def test_budgets_are_the_references_fall_with_the_row_and_hold_what_is_forced(policy, blocks):
    scored, limits = [policy.scored_budget(blocks, row) for row in range(blocks)], policy.row_limits(blocks)
    assert scored == [budget(row, blocks, policy) for row in range(blocks)]
    assert all(before >= after >= 1 for before, after in pairwise(scored))
    assert scored[0] == policy.first_row_budget(blocks)
    limited = [kept for row, kept in enumerate(limits[: max(blocks - policy.tail_blocks, 0)]) if kept <= row]
    assert limited == sorted(limited, reverse=True)
    forced = [len({j for j in range(r + 1) if j < policy.sink_blocks or j > r - policy.local_blocks}) for r in range(blocks)]
    assert all(least <= kept <= row + 1 for row, (least, kept) in enumerate(zip(forced, limits, strict=True)))


NAN, INF = math.nan, math.inf


def best(scores, row, budget, sink, local):
    """One row in plain Python."""
    forced = {j for j in range(row + 1) if j < sink or j > row - local}
    ranked = sorted(
        (j for j in range(row + 1) if j not in forced),
        key=lambda j: (not math.isnan(scores[j]), 0.0 if math.isnan(scores[j]) else -scores[j], j),
    )
    return sorted(forced | set(ranked[: budget - len(forced)]))


SCORES = st.sampled_from([NAN, -INF, INF, -1.0, -0.0, 0.0, 0.5, 1.0, 2.0])


@given(st.data())
@settings(max_examples=150)
def test_choose_equals_a_plain_sort(data):
    columns = data.draw(st.integers(1, 14), "columns")
    first = data.draw(st.integers(0, columns - 1), "first row")
    sink, local = data.draw(st.integers(0, 4), "sink"), data.draw(st.integers(1, 4), "local")
    rows = range(first, columns)
    budgets = [data.draw(st.integers(min(row + 1, sink + local), row + 1)) for row in rows]
    size = 2 * len(rows) * columns
    flat = data.draw(st.lists(SCORES, min_size=size, max_size=size), "scores")
    scores = torch.tensor(flat).view(1, 2, len(rows), columns)
    ids = choose(scores, first, budgets, sink, local)
    for head in range(2):
        for i, row in enumerate(rows):
            expected = best(scores[0, head, i].tolist(), row, budgets[i], sink, local)
            assert ids[0, head, i].tolist() == expected + [-1] * (max(budgets) - len(expected))
