"""95 % intervals: of a mean by Student's t, of a share by Wilson, of the difference of paired shares by Bonett and Price."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from stem_attention.errors import bad_argument

_Z95 = 1.959963984540054

# 0.975 quantiles of Student's t for 1, 2, ... degrees of freedom.
_T95 = (
    12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139,
    2.200985, 2.178813, 2.160369, 2.144787, 2.131450, 2.119905, 2.109816, 2.100922, 2.093024, 2.085963,
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """A mean and the interval around it; no interval (NaN ends) where there is one value only."""

    mean: float
    low: float
    high: float
    count: int

    def text(self, show: Callable[[float], str]) -> str:
        """As a cell of a table."""
        return show(self.mean) if math.isnan(self.low) else f"{show(self.mean)} [{show(self.low)}, {show(self.high)}]"

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low > 0 or self.high < 0


def mean_interval(values: Sequence[float]) -> Estimate:
    """Mean of independent values and Student's 95 % interval.

    Raises:
        ValueError: There are no values.
    """
    if not values:
        raise bad_argument("values", "at least one", "none", "measure something first")
    mean, count = fmean(values), len(values)
    half = t_quantile(count - 1) * stdev(values) / math.sqrt(count) if count > 1 else math.nan
    return Estimate(mean, mean - half, mean + half, count)


def t_quantile(freedom: int) -> float:
    """0.975 quantile of Student's t."""
    if freedom <= len(_T95):
        return _T95[freedom - 1]
    z, n = _Z95, float(freedom)  # Cornish and Fisher's expansion, within 1e-5 from 21 degrees of freedom on
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


def wilson_interval(hits: float, trials: int) -> tuple[float, float]:
    """Wilson's 95 % score interval for a share of ``hits`` in ``trials``.

    Raises:
        ValueError: There are no trials, or ``hits`` is not between 0 and their number.
    """
    if trials < 1:
        raise bad_argument("trials", "an integer >= 1", trials, "run at least one")
    if not 0 <= hits <= trials:
        raise bad_argument("hits", f"0 to {trials}", hits, "count the trials that succeeded")
    share, weight = hits / trials, _Z95**2 / trials
    centre = (share + weight / 2) / (1 + weight)
    half = math.sqrt(share * (1 - share) * weight + weight**2 / 4) / (1 + weight)
    # Where all went the same way, one end is the share itself, which rounding would put outside.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def share_interval(shares: Sequence[float]) -> Estimate:
    """Mean of independent shares and Wilson's interval, which holds for a few trials that all went the same way too.

    A trial that succeeds in part varies less than one that succeeds or fails, so that the interval is on the safe side.

    Raises:
        ValueError: There are no shares, or one lies outside 0 to 1.
    """
    return Estimate(fmean(shares), *wilson_interval(math.fsum(shares), len(shares)), len(shares))


def share_difference_interval(differences: Sequence[float]) -> Estimate:
    """Mean difference of paired shares, each from -1 to 1, and Bonett and Price's adjusted Wald interval.

    Raises:
        ValueError: There are no differences.
    """
    if not differences:
        raise bad_argument("differences", "at least one", "none", "run both on some cases")
    count = len(differences)
    gain = (math.fsum(max(x, 0.0) for x in differences) + 1) / (count + 2)
    loss = (math.fsum(max(-x, 0.0) for x in differences) + 1) / (count + 2)
    half = _Z95 * math.sqrt((gain + loss - (gain - loss) ** 2) / (count + 2))
    return Estimate(fmean(differences), max(-1.0, gain - loss - half), min(1.0, gain - loss + half), count)
