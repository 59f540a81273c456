"""Draw docs/assets/qwen15-time.svg and docs/assets/qwen15-growth.svg: accuracy against time, and work against length.

cd benchmarks && PYTHONPATH=. python -m mass_rules.plots
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable
from statistics import fmean, median
from typing import Any

import matplotlib as mpl
from mass_rules.tables import RESULTS, ROOT, exponent, law
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stem_evals.figures import short
from stem_evals.intervals import Estimate, mean_interval, share_difference_interval

EVAL, ASSETS = RESULTS / "eval", ROOT / "docs" / "assets"
NAMES = {"mass": "Mass()", "mass:share=5": "Mass(share=5)", "mass:share=8": "Mass(share=8)", "paper": "Stem.paper()"}
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


def times(name: str, tokens: int) -> float:
    """Prefill over dense's in the same window and run, median."""
    windows: Cases = defaultdict(dict)
    for line in (RESULTS / "qwen15-prefill.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        windows[f"{record['case']} at {record['commit']}"][record["contender"]] = record
    return median(one["seconds"] / dense["seconds"] for one, dense in pairs(windows, name, tokens))


def draw_line(axes: Axes, found: dict[int, Estimate], name: str) -> None:
    """A policy's points with intervals, each with its length."""
    place, points = list(NAMES).index(name), list(found.values())
    x, y = [times(name, tokens) for tokens in found], [one.mean for one in points]
    reach = [[one.mean - one.low for one in points], [one.high - one.mean for one in points]]
    axes.errorbar(x, y, reach, marker="osD^"[place], color=f"C{place}", capsize=3, elinewidth=0.8, label=NAMES[name])
    for tokens, across, up in zip(found, x, y, strict=True):
        beside = (6, -11 if place == 1 else 5)
        axes.annotate(short(tokens), (across, up), textcoords="offset points", xytext=beside, fontsize=8, color=f"C{place}")


def per_cent(found: Estimate, show: Callable[[float], float]) -> Estimate:
    return Estimate(*(100 * show(end) for end in (found.mean, found.low, found.high)), found.count)


def draw_time() -> Figure:
    """Needles, prose and code, each against the time of the whole prefill."""
    needles, windows = journal("qwen15-needle"), journal("qwen15-perplexity")
    needles = {case: of for case, of in needles.items() if case.startswith("multikey")}
    figure = Figure(figsize=(11.5, 4.1), layout="constrained")
    panels, counts = figure.subplots(1, 3), list[int]()
    for name in NAMES:
        found = {tokens: pairs(needles, name, tokens) for tokens in LENGTHS}
        shares = {
            tokens: share_difference_interval([one["share"] - dense["share"] for one, dense in of])
            for tokens, of in found.items()
            if of
        }
        counts += [one.count for one in shares.values()]
        draw_line(panels[0], {tokens: per_cent(one, float) for tokens, one in shares.items()}, name)
        for axes, text in zip(panels[1:], ("austen.txt", "code.txt"), strict=True):
            of_text = {tokens: [case[name] for case in windows.values() if name in case] for tokens in LENGTHS}
            losses = {
                tokens: [one["loss"] - one["dense_loss"] for one in of if (one["tokens"], one["text"]) == (tokens, text)]
                for tokens, of in of_text.items()
            }
            loss = {tokens: mean_interval(of) for tokens, of in losses.items() if of}
            draw_line(axes, {tokens: per_cent(one, math.expm1) for tokens, one in loss.items()}, name)
    for axes, title, label in zip(
        panels,
        (f"numbers found, n {min(counts)} to {max(counts)} prompts", "prose, n 8 windows", "code, n 8 windows"),
        ("found minus dense, points (higher is better)", *["perplexity over dense, % (lower is better)"] * 2),
        strict=True,
    ):
        axes.axhline(0, color="0.4", linestyle="--", label="dense")
        axes.axvline(1, color="0.4", linestyle=":", label="as fast as dense")
        axes.set_title(title, fontsize=9)
        axes.set(xlabel="prefill time of prose over dense's (lower is better)", ylabel=label)
        axes.grid(alpha=0.3)
    figure.suptitle("Qwen2.5-Coder-1.5B, one NVIDIA H100, transformers; 95 % intervals", fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
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
