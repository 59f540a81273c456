"""What needle's records come to: one table of shares, and the picture of depth against length."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

from stem_attention.evaluation.intervals import share_difference_interval, share_interval, wilson_interval
from stem_attention.evaluation.measure import Record, Section, Table

DENSE = "dense"


def section(records: Sequence[Record]) -> Section:
    """The report's part about needles."""
    from stem_attention.evaluation.report_plots import draw_heat

    figures = []
    for kind in dict.fromkeys(record["kind"] for record in records):
        mine = [record for record in records if record["kind"] == kind]
        figures.append((f"needle-{kind}", draw_heat(_grids(mine), f"{kind}: share of the numbers found")))
    return Section("Needles", (_table(records),), tuple(figures))


def _table(records: Sequence[Record]) -> Table:
    cells: dict[tuple[str, int, str], dict[str, Record]] = {}
    for record in records:
        cells.setdefault((record["kind"], record["tokens"], record["contender"]), {})[record["case"]] = record
    rows = []
    for (kind, tokens, name), part in cells.items():
        hits, count = sum(record["found"] for record in part.values()), len(part)
        low, high = wilson_interval(hits, count)
        dense = cells.get((kind, tokens, DENSE), {})
        paired = [record["share"] - dense[case]["share"] for case, record in part.items() if case in dense]
        rows.append((
            kind, str(tokens), name, f"{fmean(record['density'] for record in part.values()):.3f}",
            f"{hits} of {count}", f"{low:.0%} to {high:.0%}",
            share_interval([record["share"] for record in part.values()]).text("{:.1%}".format),
            share_difference_interval(paired).text(lambda x: f"{100 * x:+.1f}") if paired and name != DENSE else "",
            f"{median(record['seconds'] for record in part.values()):.2f}", str(count),
        ))  # fmt: skip
    columns = (
        "kind", "tokens", "contender", "density", "all found", "of prompts (Wilson)", "numbers found", "minus dense, points",
        "seconds", "prompts",
    )  # fmt: skip
    note = (
        "Intervals: 95 %; Wilson's over prompts, and for the difference from dense, prompt by prompt, Bonett and Price's. "
        "Seconds: median time to first token."
    )
    return Table("Numbers found", columns, tuple(rows), note)


Grid = dict[tuple[float, int], float]
"""Share found by depth and prompt length."""


def _grids(records: list[Record]) -> dict[str, Grid]:
    """One grid per contender; every number counts at the depth of the grid that is nearest to where it stood."""
    depths = sorted({record["depth"] for record in records})
    hits: dict[str, dict[tuple[float, int], list[bool]]] = {}
    for record in records:
        grid = hits.setdefault(record["contender"], {})
        for place, hit in zip(record["places"], record["hits"], strict=True):
            _, nearest = min((abs(depth - place), depth) for depth in depths)
            grid.setdefault((nearest, record["tokens"]), []).append(hit)
    return {name: {cell: fmean(found) for cell, found in grid.items()} for name, grid in hits.items()}
