"""Intervals: against their definitions, and where small samples tempt."""

import math

import pytest

from stem_evals.intervals import mean_interval, share_difference_interval, share_interval


@pytest.mark.parametrize(("hits", "trials"), [(0, 6), (1, 6), (3, 6), (6, 6), (8, 10), (90, 100), (198, 199)])
def test_the_interval_of_a_share_is_wilsons(hits, trials):
    found = share_interval([1.0] * hits + [0.0] * (trials - hits))
    assert 0 <= found.low <= found.mean <= found.high <= 1
    assert found.mean == pytest.approx(hits / trials)
    for end in {found.low, found.high} - {0.0, 1.0, found.mean}:
        assert abs(found.mean - end) / math.sqrt(end * (1 - end) / trials) == pytest.approx(1.959964, rel=1e-6)


def test_the_interval_of_a_mean_is_students():
    found = mean_interval([1.0, 2.0, 3.0, 4.0])
    half = 3.182446 * math.sqrt(5 / 3) / 2
    assert (found.mean, found.count) == (2.5, 4)
    assert (found.low, found.high) == pytest.approx((2.5 - half, 2.5 + half), rel=1e-6)
    assert found.excludes_zero
    assert mean_interval([0.25, 0.25]).text("{:.2f}".format) == "0.25 [0.25, 0.25]"


def test_one_value_has_a_mean_and_no_interval():
    found = mean_interval([7.0])
    assert math.isnan(found.low)
    assert not found.excludes_zero
    assert found.text("{:.1f}".format) == "7.0"


@pytest.mark.parametrize("interval", [mean_interval, share_interval, share_difference_interval])
def test_no_values_are_refused(interval):
    with pytest.raises(ValueError, match="values: expected at least one"):
        interval([])


def test_two_prompts_do_not_prove_a_difference_and_twenty_do():
    assert not share_difference_interval([1.0, 1.0]).excludes_zero
    assert share_difference_interval([1.0] * 20).excludes_zero
    assert not share_difference_interval([1.0, -1.0] * 10).excludes_zero
    nothing = share_difference_interval([0.0] * 10)
    assert nothing.low < 0 < nothing.high


def test_the_interval_of_a_paired_difference_is_bonett_and_prices():
    found = share_difference_interval([1.0] * 6 + [-1.0] * 2 + [0.0] * 12)
    gain, loss = 7 / 22, 3 / 22
    half = 1.959964 * math.sqrt((gain + loss - (gain - loss) ** 2) / 22)
    assert found.mean == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((gain - loss - half, gain - loss + half), rel=1e-6)
