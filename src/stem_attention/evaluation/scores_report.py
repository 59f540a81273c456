"""All measures together: who is best at equal density, one table side by side, accuracy against density and against time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from matplotlib.figure import Figure

from stem_attention.evaluation.cost_report import Place, RelativeCost
from stem_attention.evaluation.measure import Table
from stem_attention.evaluation.report_plots import Across, draw_pareto
from stem_attention.evaluation.scores import EQUAL, Column, Verdict, verdicts

STEM_FAMILIES = ("stem", "paper", "angelslim")
BOUND_FAMILIES = ("oracle",)
"""They look at the true attention, so they show what a budget could give and compete with nobody."""


def best_table(columns: Sequence[Column], families: Mapping[str, str]) -> list[Table]:
    """The table that says who is best at equal density; none where no two densities are equal."""
    stems = [name for name, family in families.items() if family in STEM_FAMILIES]
    bounds = [name for name, family in families.items() if family in BOUND_FAMILIES]
    found = [verdict for column in columns for verdict in verdicts(column, stems, bounds)]
    if not found:
        return []
    rows = tuple(_verdict_row(verdict) for verdict in found)
    heads = ("tokens", "measure", "density", "n", "best", "its value", "compared with", "its value", "lead", "verdict")
    return [Table(f"Best at equal density (within {EQUAL:.0%})", heads, rows, _in_words(found, stems))]


def _verdict_row(verdict: Verdict) -> tuple[str, ...]:
    column, metric, best = verdict.column, verdict.column.metric, verdict.members[0]
    said = "clear" if verdict.is_clear else "within noise"
    return (
        str(column.tokens),
        column.title,
        f"{column.densities[verdict.pivot]:.3f}",
        str(verdict.lead.count),
        best,
        column.estimate(best).text(metric.show),
        verdict.rival,
        column.estimate(verdict.rival).text(metric.show),
        verdict.lead.text(metric.show_difference),
        said if verdict.lead.count > 1 else "one sample",
    )


def _in_words(found: Sequence[Verdict], stems: Sequence[str]) -> str:
    lines = [
        "The lead is the best's minus the other's, case by case, with its 95 % interval; in per cent for perplexity, in "
        "percentage points for shares. Oracles look at the true attention and do not compete."
    ]
    for stem in stems:
        mine = [verdict for verdict in found if verdict.pivot == stem]
        if not mine:
            continue
        best = [verdict for verdict in mine if verdict.members[0] == stem]
        lost = [verdict for verdict in mine if verdict.members[0] != stem and verdict.rival == stem and verdict.is_clear]
        lines.append(
            f"{stem} is the best at its density in {len(best)} of {len(mine)} rows (clearly in "
            f"{sum(verdict.is_clear for verdict in best)}) and clearly behind the best in {len(lost)}."
        )
    return " ".join(lines)


def side_by_side(columns: Sequence[Column], costs: Mapping[Place, RelativeCost]) -> list[Table]:
    """One table with all measures: a row per prompt length and contender, with its time over dense's where that is known."""
    titles = list(dict.fromkeys(column.title for column in columns))
    places = list(dict.fromkeys((column.tokens, name) for column in columns for name in column.values))
    by_place = {(column.tokens, column.title): column for column in columns}
    rows = []
    for tokens, name in sorted(places, key=lambda place: place[0]):
        mine = {title: column for title in titles if (column := by_place.get((tokens, title))) and name in column.values}
        density = fmean(column.densities[name] for column in mine.values())
        cost = costs.get((tokens, name))
        time = (cost.text if cost else "",) if costs else ()
        rows.append((str(tokens), name, f"{density:.3f}", *time, *(_cell(mine.get(title), name) for title in titles)))
    note = (
        "Means with 95 % intervals (Wilson's for shares, else Student's t over cases), and the number of cases; density is the "
        "mean over the row."
    )
    heads = ("tokens", "contender", "density", *(["time over dense"] if costs else []), *titles)
    return [Table("All measures", heads, tuple(rows), note)] if rows else []


def _cell(column: Column | None, name: str) -> str:
    if column is None:
        return ""
    estimate = column.estimate(name)
    return f"{estimate.text(column.metric.show)}, n {estimate.count}"


def pareto_figures(
    columns: Sequence[Column], families: Mapping[str, str], costs: Mapping[Place, RelativeCost]
) -> list[tuple[str, Figure]]:
    """Accuracy against density and against time, a picture per prompt length with two sparse contenders to draw.

    Args:
        columns: What to draw.
        families: By contender.
        costs: Times over dense's, by prompt length and contender; those without one are in the first picture alone.
    """
    figures = []
    for tokens in dict.fromkeys(column.tokens for column in columns):
        timed = {name: cost for (length, name), cost in costs.items() if length == tokens}
        for stem, against, across in (
            ("pareto", "density", Across()),
            ("pareto-time", "attention time", _across_time(timed)),
        ):
            mine = [column for column in columns if column.tokens == tokens and across.of(column)]
            if any(len(across.of(column)) > 1 for column in mine):
                title = f"Accuracy against {against}, {tokens} tokens"
                figures.append((f"{stem}-{tokens}", draw_pareto(mine, families, title, across)))
    return figures


def _across_time(costs: Mapping[str, RelativeCost]) -> Across:
    return Across(
        "attention time over dense's, selection included",
        {name: cost.ratio.mean for name, cost in costs.items()},
        frozenset(name for name, cost in costs.items() if not cost.fused),
    )
