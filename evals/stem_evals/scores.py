"""The one number of each measure by which contenders are compared: against dense, and against others of equal density."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

import pandas as pd

from stem_evals.contender import DENSE
from stem_evals.intervals import Estimate, mean_interval, share_difference_interval, share_interval
from stem_evals.measure import Record

EQUAL = 0.05
"""Densities whose ratio differs from 1 by no more than this count as equal."""

OURS = ("mass", "stem", "paper", "angelslim")
BOUNDS = ("oracle",)
"""Families that look at the true attention: they show what a budget could give and compete with nobody."""


@dataclass(frozen=True)
class Metric:
    """How a measure's records are read.

    Attributes:
        label: Heading in tables and pictures.
        group: Field that says what a record is about; records of a group are averaged.
        values: The numbers of a record by what they are of; equal keys of two contenders are a pair.
        higher: Whether more is better.
        show: A value as text.
        show_difference: A difference of two values as text.
        plot: A value as it is drawn.
        interval: Of the mean of values.
        difference_interval: Of the mean of paired differences.
        unit: Of what is drawn, behind the label of its axis.
    """

    label: str
    group: str
    values: Callable[[Record], Mapping[Any, float]]
    higher: bool
    show: Callable[[float], str]
    show_difference: Callable[[float], str]
    plot: Callable[[float], float] = float
    interval: Callable[[Sequence[float]], Estimate] = mean_interval
    difference_interval: Callable[[Sequence[float]], Estimate] = mean_interval
    unit: str = ""


def _share(label: str, group: str, values: Callable[[Record], Mapping[Any, float]]) -> Metric:
    """A share from 0 to 1, more being better; shown in per cent, differences in percentage points."""
    return Metric(
        label, group, values, True, "{:.1%}".format, lambda x: f"{100 * x:+.1f}", lambda x: 100 * x, share_interval,
        share_difference_interval, ", %",
    )  # fmt: skip


def _by_prompt(record: Record) -> dict[Any, float]:
    """Scores of lm-eval's prompts, which older records tell apart by their place alone."""
    scores = record["sample_scores"]
    return dict(zip(record.get("docs", range(len(scores))), scores, strict=True))


METRICS = {
    "perplexity": Metric(
        "perplexity over dense", "text", lambda record: {0: record["loss"] - record["dense_loss"]}, False,
        lambda x: f"{math.exp(x):.4f}", lambda x: f"{100 * math.expm1(x):+.2f}", math.exp,
    ),
    "needle": _share("numbers found", "kind", lambda record: {0: record["share"]}),
    "layers": Metric(
        "relative error of the logits", "text", lambda record: {0: fmean(record["logit_error"])}, False, "{:.4f}".format,
        "{:+.4f}".format,
    ),
    "stress": _share("synthetic", "task", lambda record: {0: float(record["found"])}),
    "ruler": _share("RULER", "task", _by_prompt),
    "longbench": _share("LongBench", "task", _by_prompt),
}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """All values of one metric, one group and one prompt length.

    Attributes:
        tokens: Prompt length.
        metric: The metric.
        title: Metric and group.
        frame: A row for each value: ``contender``, ``pair`` (equal for values to compare), ``value``, ``density``, ``layers``
            (share of them that ran sparse).
    """

    tokens: int
    metric: Metric
    title: str
    frame: pd.DataFrame

    @cached_property
    def values(self) -> pd.DataFrame:
        """A column for each contender, in the order of the run; a row for each pair."""
        names = self.frame["contender"].unique()
        return self.frame.pivot_table(index="pair", columns="contender", values="value", aggfunc="first")[names]

    @cached_property
    def densities(self) -> dict[str, float]:
        """Mean density by contender, as its records give it."""
        return dict(self.frame.drop_duplicates(["contender", "case"]).groupby("contender", sort=False)["density"].mean())

    @property
    def sparse(self) -> list[str]:
        """Contenders that left something out: whoever kept everything is no sparse contender."""
        return [name for name, density in self.densities.items() if density < 1]

    def estimate(self, contender: str) -> Estimate:
        """Mean of a contender's values."""
        return self.metric.interval(self.values[contender].dropna().tolist())

    def difference(self, contender: str, other: str) -> Estimate | None:
        """Mean of a contender's values minus another's, of what both have run; None where that is nothing."""
        paired = (self.values[contender] - self.values[other]).dropna().tolist() if other in self.values else []
        return self.metric.difference_interval(paired) if paired else None

    def ran(self, contender: str) -> str:
        """Describe what a contender did, in words: dense, sparse, or what else."""
        layers = self.frame.loc[self.frame["contender"] == contender, "layers"].mean()
        if contender == DENSE:
            return DENSE
        if contender not in self.sparse:
            return "kept everything" if layers else "dense in every layer"
        return "sparse" if layers == 1 else f"sparse in {layers:.0%} of the layers"


def columns(records: Sequence[Record]) -> list[Column]:
    """All columns of some records, shorter prompts first; measures without a metric have none."""
    rows = [
        {
            **{field: record[field] for field in ("tokens", "measure", "contender", "case", "density")},
            "group": str(record[METRICS[record["measure"]].group]), "pair": f"{record['case']} {place}", "value": value,
            "layers": record.get("sparse_share", float(record["density"] < 1)),
        }
        for record in records
        if record["measure"] in METRICS
        for place, value in METRICS[record["measure"]].values(record).items()
    ]  # fmt: skip
    if not rows:
        return []
    frame, found = pd.DataFrame(rows), []
    for (tokens, measure), mine in frame.groupby(["tokens", "measure"], sort=False):
        groups = list(mine.groupby("group", sort=False))
        if METRICS[measure].group == "task" and len(groups) > 1:
            groups.append(("all tasks", mine))
        found += [Column(tokens, METRICS[measure], f"{METRICS[measure].label}, {group}", part) for group, part in groups]
    return sorted(found, key=lambda column: column.tokens)  # stable: measures stay in the order of the run


def score_table(found: Sequence[Column], times: Mapping[tuple[int, str], str]) -> pd.DataFrame:
    """Every contender on every measure, against dense on the same prompts; ``times`` over dense's where they are known."""
    rows = []
    for column in found:
        for name in column.values:
            estimate = column.estimate(name)
            against = column.difference(name, DENSE) if name in column.sparse else None
            rows.append({
                "tokens": str(column.tokens), "measure": column.title, "contender": name, "ran": column.ran(name),
                "density": f"{column.densities[name]:.3f}", "n": str(estimate.count),
                "value": estimate.text(column.metric.show),
                "minus dense": against.text(column.metric.show_difference) if against else "",
                **({"time over dense": times.get((column.tokens, name), "")} if times else {}),
            })  # fmt: skip
    return pd.DataFrame(rows)


def best_table(found: Sequence[Column], families: Mapping[str, str]) -> pd.DataFrame:
    """The best of every group of contenders with equal density, and its lead over the one whose density the others share.

    Densities of our own policies matter first, in the order of the run; others make groups among what is left. Where the best
    is the one whose density counts, it is compared with the second.

    Args:
        found: What to compare by.
        families: By contender.
    """
    rows = []
    for column in found:
        left, metric = [name for name in column.sparse if families[name] not in BOUNDS], column.metric
        for pivot in sorted(left, key=lambda name: families[name] not in OURS):
            members = [name for name in left if abs(column.densities[name] / column.densities[pivot] - 1) <= EQUAL]
            shared = column.values[members].dropna()
            if pivot not in left or len(members) < 2 or shared.empty:
                continue
            left = [name for name in left if name not in members]
            means = shared.mean().sort_values(ascending=not metric.higher, kind="stable")
            best = pivot if means[pivot] == means.iloc[0] else means.index[0]
            rival = pivot if best != pivot else next(name for name in means.index if name != best)
            lead = metric.difference_interval((shared[best] - shared[rival]).tolist())
            rows.append({
                "tokens": str(column.tokens), "measure": column.title, "density": f"{column.densities[pivot]:.3f}",
                "n": str(lead.count), "best": best, "its value": column.estimate(best).text(metric.show),
                "compared with": rival, "that one's value": column.estimate(rival).text(metric.show),
                "lead": lead.text(metric.show_difference),
                "verdict": "clear" if lead.excludes_zero else "within noise" if lead.count > 1 else "one sample",
            })  # fmt: skip
    return pd.DataFrame(rows)
