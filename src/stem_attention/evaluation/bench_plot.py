"""The picture of a benchmark: time against length. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from stem_attention.evaluation.bench_suites import Result


def plot_times(results: list[Result], title: str, file: Path) -> None:
    """Write a PNG: median milliseconds against tokens, one line per contestant.

    Args:
        results: At least one.
        title: Heading.
        file: Where to write.
    """
    figure = Figure(figsize=(9, 6), layout="constrained", dpi=130)
    axes = figure.add_subplot()
    ordered = sorted(results, key=lambda result: result.shape.length)
    for name in dict.fromkeys(name for result in results for name in result.times):
        points = [(r.shape.length, r.medians[name] * 1e3) for r in ordered if name in r.times]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    lengths = [result.shape.length for result in ordered]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [_short(length) for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("tokens")
    axes.set_ylabel("milliseconds")
    axes.set_title(title)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(file)


def _short(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)
