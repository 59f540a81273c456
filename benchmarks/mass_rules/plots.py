"""Draw docs/assets/qwen15-time.svg and docs/assets/qwen15-growth.svg: accuracy against time, and work against length.

cd benchmarks && PYTHONPATH=. python -m mass_rules.plots
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from statistics import fmean, median
from typing import Any

import matplotlib as mpl
from mass_rules.tables import RESULTS, ROOT, exponent, law
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stem_evals.figures import short
from stem_evals.intervals import Estimate, mean_interval, share_difference_interval

EVAL, ASSETS = RESULTS / "eval", ROOT / "docs" / "assets"
NAMES = {"mass": "Mass()", "paper": "Stem.paper()"}
LENGTHS = (8192, 16384, 32768)
LAWS = {1.0: "share / NB, as in Mass", 0.75: "share / NB^0.75", 0.4: "share / NB^0.4"}

Cases = dict[str, dict[str, dict[str, Any]]]


def journal(name: str) -> Cases:
    """Records by case and contender."""
    cases: Cases = defaultdict(dict)
    for line in (EVAL / name / "records.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        cases[record["case"]][record["contender"]] = record
    return cases


def pairs(cases: Cases, name: str, tokens: int, text: str | None = None) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """A contender's and dense's records of the cases that both answered."""
    found = [(case[name], case["dense"]) for case in cases.values() if {name, "dense"} <= set(case)]
    return [(one, dense) for one, dense in found if one["tokens"] == tokens and text in (None, one.get("text"))]


def times(windows: Cases, name: str, tokens: int, text: str | None = None) -> float:
    """Prefill over dense's in the same window, median."""
    return median(one["seconds"] / dense["seconds"] for one, dense in pairs(windows, name, tokens, text))


def draw_line(axes: Axes, x: list[float], found: list[Estimate], name: str, place: int) -> None:
    """A policy's points with intervals, each with its length."""
    y = [one.mean for one in found]
    reach = [[one.mean - one.low for one in found], [one.high - one.mean for one in found]]
    axes.errorbar(x, y, reach, marker="os"[place], color=f"C{place}", capsize=3, elinewidth=0.8, label=NAMES[name])
    for tokens, across, up in zip(LENGTHS, x, y, strict=True):
        axes.annotate(short(tokens), (across, up), textcoords="offset points", xytext=(6, 5), fontsize=8, color=f"C{place}")


def draw_time() -> Figure:
    """Needles, prose and code, each against the time of the whole prefill."""
    needles, windows = journal("qwen15-needle"), journal("qwen15-perplexity")
    figure = Figure(figsize=(11.5, 4.1), layout="constrained")
    panels = figure.subplots(1, 3)
    for place, name in enumerate(NAMES):
        found = [
            share_difference_interval([one["share"] - dense["share"] for one, dense in pairs(needles, name, tokens)])
            for tokens in LENGTHS
        ]
        points = [Estimate(100 * e.mean, 100 * e.low, 100 * e.high, e.count) for e in found]
        draw_line(panels[0], [times(windows, name, tokens) for tokens in LENGTHS], points, name, place)
        for axes, text in zip(panels[1:], ("austen.txt", "code.txt"), strict=True):
            loss = [
                mean_interval([one["loss"] - dense["loss"] for one, dense in pairs(windows, name, tokens, text)])
                for tokens in LENGTHS
            ]
            points = [Estimate(*(100 * math.expm1(end) for end in (e.mean, e.low, e.high)), e.count) for e in loss]
            draw_line(axes, [times(windows, name, tokens, text) for tokens in LENGTHS], points, name, place)
    for axes, title, label in zip(
        panels,
        ("numbers found, n 30 to 283 prompts", "prose, n 8 windows", "code, n 8 windows"),
        ("found minus dense, points (higher is better)", *["perplexity over dense, % (lower is better)"] * 2),
        strict=True,
    ):
        axes.axhline(0, color="0.4", linestyle="--", label="dense")
        axes.axvline(1, color="0.4", linestyle=":", label="as fast as dense")
        axes.set_title(title, fontsize=9)
        axes.set(xlabel="prefill time over dense's (lower is better)", ylabel=label)
        axes.grid(alpha=0.3)
    figure.suptitle("Qwen2.5-Coder-1.5B, one NVIDIA H100, transformers; 95 % intervals", fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def draw_growth() -> Figure:
    """Kept tokens a row and divergence against length, for three laws of the threshold."""
    figure = Figure(figsize=(10, 4.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, (power, name) in enumerate(LAWS.items()):
        points = law(power)
        slope, half = exponent(points, lambda point: point.kept)
        label = f"{name}: work ∝ N^{1 + slope:.2f} ± {half:.2f}"
        for text, line in (("austen.txt", "-"), ("code.txt", "--")):
            of_it = [point for point in points if point.window[0] == text]
            lengths = sorted({point.tokens for point in of_it})
            for axes, what in ((left, "kept"), (right, "kl")):
                y = [math.exp(fmean(getattr(p, what) for p in of_it if p.tokens == tokens)) for tokens in lengths]
                axes.plot(lengths, y, line, marker="osD"[place], color=f"C{place}", label=label if line == "-" else None)
    lengths = sorted({point.tokens for point in law(1.0)})
    left.plot(lengths, [tokens / 2 for tokens in lengths], ":", color="0.4", label="dense: work ∝ N^2")
    left.set_title("kept tokens a row (lower is faster)", fontsize=9)
    right.set_title("KL divergence from dense, nats a token (lower is better)", fontsize=9)
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="tokens of the prompt, N")
        axes.set_xticks(lengths, [short(tokens) for tokens in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.set_yticks([1000, 3000, 10000, 30000], ["1000", "3000", "10000", "30000"])
    right.set_yticks([0.005, 0.01, 0.02, 0.05, 0.1], ["0.005", "0.01", "0.02", "0.05", "0.1"])
    title = "Qwen2.5-Coder-1.5B, YaRN x4, one NVIDIA H100, 3 windows; solid: prose, broken: code; ± 95 %"
    figure.suptitle(title, fontsize=10)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def main() -> None:
    """The same records give the same files."""
    mpl.rcParams["svg.hashsalt"] = "stem-attention"
    for name, figure in (("qwen15-time", draw_time()), ("qwen15-growth", draw_growth())):
        figure.savefig(ASSETS / f"{name}.svg", metadata={"Date": None})
        print(f"drew docs/assets/{name}.svg")


if __name__ == "__main__":
    main()
