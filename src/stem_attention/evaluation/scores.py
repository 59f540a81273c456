"""The one number of each measure by which contenders are compared, and who is best at equal density."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from statistics import fmean

from stem_attention.evaluation.intervals import Estimate, mean_interval, share_difference_interval, share_interval
from stem_attention.evaluation.measure import Record

EQUAL = 0.05
"""Densities whose ratio differs from 1 by no more than this count as equal."""


@dataclass(frozen=True)
class Metric:
    """How a measure's records are read.

    Attributes:
        label: Heading in tables and pictures.
        group: What a record is about, such as its text or kind; records of a group are averaged. May be empty.
        values: The numbers of a record: one, or one per prompt, in the same order for every contender.
        higher: Whether more is better.
        show: A value as text.
        show_difference: A difference of two values as text.
        plot: A value as it is drawn.
        axis: What is drawn, with its unit.
        interval: Of the mean of values.
        difference_interval: Of the mean of paired differences.
    """

    label: str
    group: Callable[[Record], str]
    values: Callable[[Record], Sequence[float]]
    higher: bool
    show: Callable[[float], str]
    show_difference: Callable[[float], str]
    plot: Callable[[float], float]
    axis: str
    interval: Callable[[Sequence[float]], Estimate] = mean_interval
    difference_interval: Callable[[Sequence[float]], Estimate] = mean_interval


def share_metric(label: str, group: Callable[[Record], str], values: Callable[[Record], Sequence[float]]) -> Metric:
    """A share from 0 to 1, more being better; differences are shown in percentage points."""
    return Metric(
        label,
        group,
        values,
        higher=True,
        show=lambda x: f"{x:.1%}",
        show_difference=lambda x: f"{100 * x:+.1f}",
        plot=lambda x: 100 * x,
        axis=f"{label}, %",
        interval=share_interval,
        difference_interval=share_difference_interval,
    )


METRICS: dict[str, Metric] = {
    "perplexity": Metric(
        "perplexity over dense",
        lambda record: str(record["text"]),
        lambda record: [record["loss"] - record["dense_loss"]],
        higher=False,
        show=lambda x: f"{math.exp(x):.4f}",
        show_difference=lambda x: f"{math.expm1(x):+.2%}",
        plot=math.exp,
        axis="perplexity over dense",
    ),
    "needle": share_metric("needles found", lambda record: str(record["kind"]), lambda record: [record["share"]]),
    "layers": Metric(
        "relative error of the logits",
        lambda record: str(record["text"]),
        lambda record: [fmean(record["logit_error"])],
        higher=False,
        show=lambda x: f"{x:.4f}",
        show_difference=lambda x: f"{x:+.4f}",
        plot=float,
        axis="relative error",
    ),
    "stress": share_metric("synthetic", lambda record: str(record["task"]), lambda record: [float(record["found"])]),
    "ruler": share_metric("RULER", lambda record: "", lambda record: list(record["sample_scores"])),
    "longbench": share_metric("LongBench", lambda record: "", lambda record: list(record["sample_scores"])),
}


@dataclass(frozen=True)
class Column:
    """All values of one metric, one group and one prompt length.

    Attributes:
        tokens: Prompt length.
        metric: The metric.
        group: The group.
        values: By contender, then by case and place in its record.
        densities: By contender.
    """

    tokens: int
    metric: Metric
    group: str
    values: dict[str, dict[tuple[str, int], float]]
    densities: dict[str, float]

    @property
    def title(self) -> str:
        """Metric and group."""
        return f"{self.metric.label}, {self.group}" if self.group else self.metric.label

    def estimate(self, contender: str) -> Estimate:
        """Mean of a contender's values."""
        return self.metric.interval(list(self.values[contender].values()))


def columns(records: Sequence[Record]) -> list[Column]:
    """All columns of some records, shorter prompts first; measures without a metric have none."""
    parts: dict[tuple[int, str, str], list[Record]] = {}
    for record in records:
        if record["measure"] in METRICS:
            group = METRICS[record["measure"]].group(record)
            parts.setdefault((record["tokens"], record["measure"], group), []).append(record)
    ordered = sorted(parts.items(), key=lambda part: part[0][0])  # stable: measures stay in the order of the run
    return [_column(tokens, METRICS[measure], group, part) for (tokens, measure, group), part in ordered]


def _column(tokens: int, metric: Metric, group: str, records: list[Record]) -> Column:
    values: dict[str, dict[tuple[str, int], float]] = {}
    densities: dict[str, list[float]] = {}
    for record in records:
        mine = values.setdefault(record["contender"], {})
        mine.update({(record["case"], place): value for place, value in enumerate(metric.values(record))})
        densities.setdefault(record["contender"], []).append(record["density"])
    return Column(tokens, metric, group, values, {name: fmean(kept) for name, kept in densities.items()})


@dataclass(frozen=True)
class Verdict:
    """Who is best among contenders of equal density.

    Attributes:
        column: Where.
        pivot: The contender whose density the others share.
        members: All of them, the best first.
        rival: Whom the best is compared with: the pivot, or where that is the best, the second.
        lead: Best minus rival, case by case.
    """

    column: Column
    pivot: str
    members: tuple[str, ...]
    rival: str
    lead: Estimate

    @property
    def is_clear(self) -> bool:
        """Whether the interval of the lead excludes 0."""
        return self.lead.excludes_zero


def verdicts(column: Column, stems: Sequence[str], bounds: Collection[str] = ()) -> list[Verdict]:
    """The best of every group of contenders with equal density.

    Args:
        column: What to compare by.
        stems: Contenders whose densities matter first, in the order of the run; others make groups among what is left.
        bounds: Contenders that show what is possible and cannot be run; they do not compete.
    """
    kept = {name: density for name, density in column.densities.items() if density < 1 and name not in bounds}
    left, found = set(kept), list[Verdict]()
    for pivot in sorted(kept, key=lambda name: name not in stems):
        if pivot not in left:
            continue
        members = [name for name in kept if abs(kept[name] / kept[pivot] - 1) <= EQUAL]
        left -= set(members)
        verdict = _verdict(column, pivot, members)
        if verdict is not None:
            found.append(verdict)
    return found


def _verdict(column: Column, pivot: str, members: list[str]) -> Verdict | None:
    shared = set.intersection(*(set(column.values[name]) for name in members))
    if len(members) < 2 or not shared:
        return None
    means = {name: fmean(column.values[name][case] for case in shared) for name in members}
    sign = -1 if column.metric.higher else 1
    ranked = sorted(members, key=lambda name: (sign * means[name], name != pivot))
    rival = pivot if ranked[0] != pivot else ranked[1]
    lead = column.metric.difference_interval(
        [column.values[ranked[0]][case] - column.values[rival][case] for case in sorted(shared)]
    )
    return Verdict(column, pivot, tuple(ranked), rival, lead)
