"""Intervals: against their definitions, and where small samples tempt."""

import math

import pytest

from stem_attention.evaluation.intervals import (
    mean_interval,
    share_difference_interval,
    share_interval,
    t_quantile,
    wilson_interval,
)


@pytest.mark.parametrize(("hits", "trials"), [(0, 6), (1, 6), (3, 6), (6, 6), (8, 10), (90, 100)])
def test_wilson_interval_ends_where_the_score_test_rejects(hits: int, trials: int) -> None:
    low, high = wilson_interval(hits, trials)
    assert 0 <= low <= hits / trials <= high <= 1
    for end in {low, high} - {0.0, 1.0}:
        assert abs(hits / trials - end) / math.sqrt(end * (1 - end) / trials) == pytest.approx(1.959964, rel=1e-6)
    assert high - low < 1


@pytest.mark.parametrize("trials", range(1, 200))
def test_wilson_interval_holds_the_share_in_spite_of_rounding(trials: int) -> None:
    for hits in (0, 1, trials - 1, trials):
        low, high = wilson_interval(hits, trials)
        assert 0 <= low <= hits / trials <= high <= 1


def test_wilson_interval_needs_trials_and_no_more_hits_than_those() -> None:
    with pytest.raises(ValueError, match="trials"):
        wilson_interval(0, 0)
    with pytest.raises(ValueError, match="hits"):
        wilson_interval(3, 2)


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.706205), (4, 2.776445), (20, 2.085963), (21, 2.079614), (60, 2.000298)]
)
def test_t_quantiles_are_those_of_the_tables(freedom: int, expected: float) -> None:
    assert t_quantile(freedom) == pytest.approx(expected, abs=1e-5)


def test_mean_interval_is_students() -> None:
    found = mean_interval([1.0, 2.0, 3.0, 4.0])
    half = 3.182446 * math.sqrt(5 / 3) / 2
    assert (found.mean, found.count) == (2.5, 4)
    assert (found.low, found.high) == pytest.approx((2.5 - half, 2.5 + half), rel=1e-6)
    assert found.excludes_zero


def test_one_value_has_a_mean_and_no_interval() -> None:
    found = mean_interval([7.0])
    assert math.isnan(found.low)
    assert not found.excludes_zero
    assert found.text("{:.1f}".format) == "7.0"


def test_shares_that_are_all_alike_still_have_an_interval() -> None:
    assert share_interval([1.0, 1.0]).low < 0.5
    assert share_interval([0.5, 1.0]).mean == 0.75
    assert share_interval([0.0] * 50).high < 0.08


def test_two_prompts_do_not_prove_a_difference_and_twenty_do() -> None:
    assert not share_difference_interval([1.0, 1.0]).excludes_zero
    assert share_difference_interval([1.0] * 20).excludes_zero
    assert not share_difference_interval([1.0, -1.0] * 10).excludes_zero
    nothing = share_difference_interval([0.0] * 10)
    assert nothing.low < 0 < nothing.high


def test_paired_difference_is_bonett_and_prices() -> None:
    found = share_difference_interval([1.0] * 6 + [-1.0] * 2 + [0.0] * 12)
    gain, loss = 7 / 22, 3 / 22
    half = 1.959964 * math.sqrt((gain + loss - (gain - loss) ** 2) / 22)
    assert found.mean == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((gain - loss - half, gain - loss + half), rel=1e-6)
