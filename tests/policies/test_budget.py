"""Token Position-Decay budgets: worked by hand, monotone, continuous, and equal to the oracle's own arithmetic."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_attention import StemConfig
from stem_attention.backends.reference.select import budget
from stem_attention.policies.budget import block_count, first_row_budget, forced_count, row_budgets, scored_budget

PRESETS = {"default": StemConfig(), "paper": StemConfig.paper(), "angelslim": StemConfig.angelslim()}


def test_block_count_rounds_up():
    assert [block_count(n, 128) for n in (0, 1, 127, 128, 129, 16384)] == [0, 1, 1, 1, 2, 128]


def test_the_public_codes_schedule_falls_even_over_two_rows():
    config = StemConfig.angelslim(ratio_short=0.45)
    assert first_row_budget(config, 58) == 56
    assert [scored_budget(config, 58, row) for row in (55, 56, 57)] == [56, 56, 39]


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
    assert {blocks: first_row_budget(PRESETS[preset], blocks) for blocks in expected} == expected


def test_row_budgets_of_the_paper_worked_by_hand():
    """NB = 64: k_start = 13, and the budget falls by 13 * 0.3 / 64 a row, towards 9.1, each row rounded up."""
    rows = row_budgets(StemConfig.paper(), 64)
    assert rows[:12] == tuple(range(1, 13))
    # 13 - 0.0609 * I: first at or under 12 at I = 17 (16.4), 11 at 33 (32.8), 10 at 50 (49.2).
    assert rows[12:17] == (13,) * 5
    assert rows[17:33] == (12,) * 16
    assert rows[33:50] == (11,) * 17
    assert rows[50:] == (10,) * 14


def test_row_budgets_of_the_default_add_two_whole_tail_rows_to_the_papers():
    assert row_budgets(StemConfig(), 64) == (*row_budgets(StemConfig.paper(), 64)[:62], 63, 64)


def test_row_budgets_of_the_public_code_worked_by_hand():
    """NB = 64: k_start = 42; rows 42..63 fall from 42 to floor(29.4) in 21 equal steps of 0.6; 8 forced blocks on top."""
    config = StemConfig.angelslim()
    assert [scored_budget(config, 64, row) for row in (0, 41, 42, 43, 44, 47, 62, 63)] == [42, 42, 42, 41, 40, 39, 30, 29]
    rows = row_budgets(config, 64)
    assert rows[:47] == tuple(range(1, 48))
    # 42 - 0.6 * (I - 42): 39 at 47, so 39 + 8; 37.2 at 50, so 37 + 8; 29.4 at 63, so 29 + 8.
    assert (rows[47], rows[50], rows[63]) == (47, 45, 37)


def test_short_prompts_keep_their_forced_blocks_whatever_the_ratio():
    assert row_budgets(StemConfig.paper(), 5) == (1, 2, 3, 4, 5)
    assert row_budgets(StemConfig.paper(sink_blocks=1, local_blocks=2, min_blocks=1), 10) == (1, 2, 3, 3, 3, 3, 3, 3, 3, 3)
    assert min(row_budgets(StemConfig.paper(), 40)[7:]) == 8


@pytest.mark.parametrize("tail", [0, 1, 3, 99])
@pytest.mark.parametrize("preset", PRESETS)
def test_tail_rows_keep_everything(preset, tail):
    config = StemConfig.from_dict({**PRESETS[preset].to_dict(), "tail_blocks": tail})
    bare = StemConfig.from_dict({**PRESETS[preset].to_dict(), "tail_blocks": 0})
    rows = row_budgets(config, 80)
    border = max(80 - tail, 0)
    assert rows[border:] == tuple(range(border + 1, 81))
    assert rows[:border] == row_budgets(bare, 80)[:border]


def test_uniform_decay_keeps_the_same_number_in_every_row():
    assert set(row_budgets(StemConfig.paper(decay=1.0), 200)[20:]) == {20}


def test_decay_leaves_its_share_to_the_last_row():
    config = StemConfig.paper(min_blocks=1, sink_blocks=0, local_blocks=1)
    assert row_budgets(config, 1280)[127] == math.ceil(128 - 128 * 0.3 * 127 / 1280)
    assert row_budgets(config, 1280)[-1] == math.ceil(128 - 128 * 0.3 * 1279 / 1280) == 90


def test_paper_preset_keeps_a_quarter_of_the_causal_blocks_over_ruler_lengths():
    """Section 4: 25.9 % of the causal blocks, averaged over 4K ... 128K, which is what the paper reports."""
    densities = []
    for thousands in (4, 8, 16, 32, 64, 128):
        blocks = thousands * 1024 // 128
        densities.append(sum(row_budgets(StemConfig.paper(), blocks)) / (blocks * (blocks + 1) / 2))
    assert sum(densities) / len(densities) == pytest.approx(0.259, abs=5e-4)


def test_default_first_row_budget_is_continuous_in_length_and_never_falls():
    budgets = [first_row_budget(StemConfig(), blocks) for blocks in range(1, 2100)]
    assert {after - before for before, after in pairwise(budgets)} <= {0, 1}


def test_the_papers_schedule_jumps_at_the_knee():
    assert first_row_budget(StemConfig.paper(), 129) < first_row_budget(StemConfig.paper(), 128) - 10


def test_the_knee_is_in_tokens_not_in_blocks():
    small = StemConfig.paper(block_size=64)
    assert first_row_budget(small, 256) == math.ceil(0.2 * 256)
    assert first_row_budget(small, 257) == math.ceil(0.1 * 257)
    assert first_row_budget(StemConfig(block_size=64), 512) == math.ceil(0.2 * 256)


CONFIGS = st.builds(
    lambda short, share, **fields: StemConfig(ratio_short=short, ratio_long=short * share, **fields),
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


@given(CONFIGS, LENGTHS)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_scored_budgets_equal_the_oracles(config, blocks):
    assert [scored_budget(config, blocks, row) for row in range(blocks)] == [
        budget(row, blocks, config) for row in range(blocks)
    ]


@given(CONFIGS, LENGTHS)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_earlier_tokens_never_have_the_smaller_budget(config, blocks):
    scored = [scored_budget(config, blocks, row) for row in range(blocks)]
    assert all(before >= after >= 1 for before, after in pairwise(scored))
    assert scored[0] == first_row_budget(config, blocks)
    middle = row_budgets(config, blocks)[: max(blocks - config.tail_blocks, 0)]
    limited = [row for row, kept in enumerate(middle) if kept <= row]
    assert all(middle[a] >= middle[b] for a, b in pairwise(limited))


@given(CONFIGS, LENGTHS)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_every_row_holds_its_forced_blocks_and_no_more_than_the_causal_ones(config, blocks):
    rows = row_budgets(config, blocks)
    assert len(rows) == blocks
    assert all(forced_count(config, row) <= kept <= row + 1 for row, kept in enumerate(rows))
    forced = [len({j for j in range(r + 1) if j < config.sink_blocks or j > r - config.local_blocks}) for r in range(blocks)]
    assert [forced_count(config, row) for row in range(blocks)] == forced


@given(CONFIGS, LENGTHS)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_smooth_schedule_is_continuous_for_every_ratio_and_knee(config, blocks):
    config = StemConfig.from_dict({**config.to_dict(), "schedule": "smooth"})
    step = first_row_budget(config, blocks + 1) - first_row_budget(config, blocks)
    assert 0 <= step <= 1
