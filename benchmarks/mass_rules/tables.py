"""Print tables of docs/mass-record.md that come from mass-15b.jsonl: rules beside Mass, and work against length.

cd benchmarks && PYTHONPATH=. python -m mass_rules.tables
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from scipy import stats

from stem_evals.intervals import mean_interval

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "evidence"
RECORDS = RESULTS / "mass-15b.jsonl"
AGREE = 16384
"""The length at which every law of the threshold keeps what ``share=4`` keeps."""
POWERS = (1.0, 0.75, 0.5, 0.4, 0.25, 0.0)

Record = dict[str, Any]
Window = tuple[str, int]
Readings = dict[int, dict[str, Record]]
"""By tokens and contender."""


def records(study: str) -> list[Record]:
    """Those of one study."""
    found = [json.loads(line) for line in RECORDS.read_text(encoding="utf-8").splitlines()]
    return [record for record in found if record["study"] == study]


def over(record: Record) -> float:
    """Logarithm of perplexity over dense."""
    return float(record["loss"] - record["dense_loss"])


def ratio(x: float) -> str:
    """Write a logarithm as what it stands for."""
    return f"{math.exp(x):.4f}"


def print_rules() -> None:
    """A rule beside Mass, interpolated in the same window: KL and loss at equal density, density at equal KL."""
    windows: dict[Window, dict[str, Record]] = defaultdict(dict)
    for record in records("rules"):
        windows[record["text"], record["start"]][record["contender"]] = record
    rows: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for found in windows.values():
        curve = sorted(
            (math.log(r["density"]), math.log(r["kl"]), r["loss"]) for n, r in found.items() if n.startswith("mass:")
        )
        density, kl, loss = np.array(curve).T
        for name, r in found.items():
            if name != "dense":
                at, far = math.log(r["density"]), math.log(r["kl"])
                beside = far - np.interp(at, density, kl), r["loss"] - np.interp(at, density, loss)
                rows[name].append(
                    (r["density"], over(r), r["kl"], *beside, at - np.interp(far, kl[::-1], density[::-1], np.nan, np.nan))
                )
    print("| rule | n | density | over dense | KL | KL over Mass's | loss minus Mass's, % | blocks at equal KL, of Mass's |")
    print("|---|--:|--:|---|--:|---|---|---|")
    for name, values in sorted(rows.items(), key=lambda row: (row[0].split("@")[-1], fmean(one[3] for one in row[1]))):
        kept, above, divergence, times, more, blocks = zip(*values, strict=True)
        cells = [
            name, len(values), f"{fmean(kept):.3f}", mean_interval(above).text(ratio), f"{fmean(divergence):.4f}",
            mean_interval(times).text(lambda x: f"{math.exp(x):.3f}"), mean_interval(more).text(lambda x: f"{100 * x:+.2f}"),
            "not reached" if any(map(math.isnan, blocks)) else mean_interval(blocks).text(lambda x: f"{math.exp(x):.3f}"),
        ]  # fmt: skip
        print("|", " | ".join(map(str, cells)), "|")


def print_digits() -> None:
    """Numbers found under the rules, and their negative log-likelihood minus that of Mass(share=8)."""
    found: dict[str, dict[str, Record]] = defaultdict(dict)
    for record in records("digits"):
        found[record["contender"]][record["case"]] = record
    base = found["mass:share=8.0"]
    print("\n| rule | n | density | found | nats |\n|---|--:|--:|--:|---|")
    for name, cases in found.items():
        nats = mean_interval([record["nll"] - base[case]["nll"] for case, record in cases.items()]).text(lambda x: f"{x:+.3f}")
        hits, density = sum(record["found"] for record in cases.values()), fmean(record["density"] for record in cases.values())
        print(f"| {name} | {len(cases)} | {density:.3f} | {hits} | {nats} |")


@dataclass(frozen=True)
class Point:
    """A window at a length under some threshold: logarithms of kept tokens a row, of KL, and of perplexity over dense."""

    window: Window
    tokens: int
    kept: float
    kl: float
    over: float


def readings() -> dict[Window, Readings]:
    """What ``growth`` recorded, by the text's end."""
    found: dict[Window, Readings] = defaultdict(lambda: defaultdict(dict))
    for record in records("growth"):
        found[record["text"], record["end"]][record["tokens"]][record["contender"]] = record
    return found


def _curve(contenders: dict[str, Record]) -> np.ndarray:
    """Rows of log share, log kept tokens a row, log KL and loss over dense, by share."""
    shares = sorted((float(name.split("=")[1]), r) for name, r in contenders.items() if name.startswith("mass:share"))
    rows = [(math.log(s), math.log(r["density"] * r["tokens"] / 2), math.log(r["kl"]), over(r)) for s, r in shares]
    return np.array(rows)


def law(power: float) -> list[Point]:
    """Every window at every length where the threshold goes with ``NB ** -power``, between the shares that were read."""
    points = []
    for window, lengths in readings().items():
        for tokens, contenders in lengths.items():
            curve, share = _curve(contenders), math.log(4) + (1 - power) * math.log(tokens / AGREE)
            if curve[0, 0] - 1e-9 <= share <= curve[-1, 0] + 1e-9:
                points.append(Point(window, tokens, *(float(np.interp(share, curve[:, 0], column)) for column in curve.T[1:])))
    return points


def equal_divergence() -> list[Point]:
    """Every window at every length where KL is what ``share=4`` has at 16K in the same window."""
    points = []
    for window, lengths in readings().items():
        target = math.log(lengths[AGREE]["mass:share=4.0"]["kl"])
        for tokens, contenders in lengths.items():
            curve = _curve(contenders)
            if curve[0, 2] - 1e-9 <= target <= curve[-1, 2] + 1e-9:
                kept, above = (float(np.interp(target, curve[:, 2], column)) for column in (curve[:, 1], curve[:, 3]))
                points.append(Point(window, tokens, kept, target, above))
    return points


def exponent(points: Sequence[Point], what: Callable[[Point], float]) -> tuple[float, float]:
    """Power of the length with which a quantity grows, one line for all windows and a level for each; and its half interval."""
    x, y = (np.array(values) for values in ([math.log(p.tokens) for p in points], [what(p) for p in points]))
    windows = {point.window for point in points}
    for window in windows:
        of_it = np.array([point.window == window for point in points])
        x[of_it] -= x[of_it].mean()
        y[of_it] -= y[of_it].mean()
    slope, free = float(x @ y / (x @ x)), len(points) - len(windows) - 1
    error = math.sqrt(((y - slope * x) ** 2).sum() / free / (x @ x))
    return slope, float(stats.t.ppf(0.975, free)) * error


def print_growth() -> None:
    """Work and divergence under each law of the threshold."""
    laws = {"equal KL": equal_divergence(), **{f"share / NB^{power:g}": law(power) for power in POWERS}}
    print("\n| threshold | points | work grows as N to the | KL grows as N to the | over dense, prose | code |")
    print("|---|--:|---|---|---|---|")
    for name, points in laws.items():
        work, kl = (exponent(points, what) for what in (lambda p: p.kept, lambda p: p.kl))
        cells = [f"{1 + work[0]:.2f} ± {work[1]:.2f}", "0" if name == "equal KL" else f"{kl[0]:+.2f} ± {kl[1]:.2f}"]
        for text in ("austen.txt", "code.txt"):
            of_it: dict[int, list[float]] = defaultdict(list)
            for point in points:
                if point.window[0] == text:
                    of_it[point.tokens // 1024].append(point.over)
            cells.append(", ".join(f"{tokens}K {ratio(fmean(values))}" for tokens, values in of_it.items()))
        print("|", " | ".join([name, str(len(points)), *cells]), "|")


if __name__ == "__main__":
    print_rules()
    print_digits()
    print_growth()
