"""95 % intervals, worked out by scipy: of a mean, of a share, and of the difference of paired shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from stem_attention.errors import bad_argument

_LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and the interval around it; no interval (NaN ends) where there is one value only."""

    mean: float
    low: float
    high: float
    count: int

    def text(self, show: Callable[[float], str]) -> str:
        """Write it as a cell of a table."""
        return show(self.mean) if math.isnan(self.low) else f"{show(self.mean)} [{show(self.low)}, {show(self.high)}]"

    @property
    def excludes_zero(self) -> bool:
        """Tell whether the interval lies on one side of 0."""
        return self.low > 0 or self.high < 0


def mean_interval(values: Sequence[float]) -> Estimate:
    """Mean of independent values and Student's interval.

    Raises:
        ValueError: There are no values.
    """
    _check(values)
    mean, count = float(np.mean(values)), len(values)
    half = float(stats.t.ppf((1 + _LEVEL) / 2, count - 1) * stats.sem(values)) if count > 1 else math.nan
    return Estimate(mean, mean - half, mean + half, count)


def share_interval(shares: Sequence[float]) -> Estimate:
    """Mean of independent shares and Wilson's score interval, which also holds for a few trials that all went the same way.

    A trial that succeeds in part varies less than one that succeeds or fails, so that the interval is on the safe side.

    Raises:
        ValueError: There are no shares, or one lies outside 0 to 1.
    """
    _check(shares)
    mean = float(np.mean(shares))
    ends = stats.binomtest(round(math.fsum(shares)), len(shares)).proportion_ci(_LEVEL, method="wilson")
    return Estimate(mean, min(ends.low, mean), max(ends.high, mean), len(shares))


def share_difference_interval(differences: Sequence[float]) -> Estimate:
    """Mean difference of paired shares, each from -1 to 1, and Bonett and Price's adjusted Wald interval.

    Bonett and Price (2012) add one pair that was won and one that was lost, so that a few pairs without a difference prove
    little. Pairs that differ in part vary less than this assumes: the interval is on the safe side.

    Raises:
        ValueError: There are no differences.
    """
    _check(differences)
    count = len(differences) + 2
    gain, loss = ((math.fsum(max(sign * x, 0.0) for x in differences) + 1) / count for sign in (1, -1))
    low, high = stats.norm.interval(_LEVEL, gain - loss, math.sqrt((gain + loss - (gain - loss) ** 2) / count))
    return Estimate(float(np.mean(differences)), max(-1.0, float(low)), min(1.0, float(high)), len(differences))


def _check(values: Sequence[float]) -> None:
    if not len(values):
        raise bad_argument("values", "at least one", "none", "measure something first")
