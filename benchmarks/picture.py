"""Draw README's picture, docs/assets/speed.png, from evidence: `python benchmarks/picture.py`.

Left what is gained, a whole model's time to first token; right what it costs, needles that are no longer found. Needs the
distribution in evals/.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from stem_evals.intervals import share_difference_interval

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PICTURE = ROOT / "evidence", ROOT / "docs" / "assets" / "speed.png"
SHORTEST = 8192  # below, prompts run dense
DENSE, STEM, REST = "#7d8590", "#bf8700", "#d0d4da"
# How a policy is called in the records, and here.
POLICIES = {"mass:file=heads.json": "Mass, calibrated", "mass": "Mass()", "stem": "Stem()", "paper": "Stem.paper()"}
COLOURS = ("#2da44e", "#1f6feb", STEM, "#cf222e")


def draw_speed(axes: Axes, report: dict[str, Any]) -> None:
    """Two bars a length, dense and sparse, relative to the dense prefill; attention apart from the rest."""
    results = [result for result in report["results"] if result["length"] >= SHORTEST]
    for place, result in enumerate(results):
        dense = min((t for name, t in result["timings"].items() if name != "Stem"), key=lambda timing: timing["seconds"])
        for side, timing, colour in ((-0.2, dense, DENSE), (0.2, result["timings"]["Stem"], STEM)):
            height = timing["seconds"] / dense["seconds"]
            rest = height * (1 - timing["parts"]["attention"] / timing["parts"]["total"])
            axes.bar(place + side, rest, 0.38, color=REST)
            axes.bar(place + side, height - rest, 0.38, bottom=rest, color=colour)
            shown = f"{timing['seconds']:.{1 if timing['seconds'] >= 1 else 2}f} s"
            axes.text(place + side, height + 0.01, shown, ha="center", va="bottom", fontsize=8)
        axes.text(place, 1.1, f"{result['ratios']['total']:.2f}x\nas fast", ha="center", fontsize=9, weight="bold", color=STEM)
    for colour, label in ((DENSE, "attention, dense"), (STEM, "attention, Stem()"), (REST, "the rest of the model")):
        axes.bar(0, 0, color=colour, label=label)
    axes.set_xticks(range(len(results)), [f"{result['length'] // 1024}K" for result in results])
    axes.set(ylim=(0, 1.25), yticks=[0, 0.25, 0.5, 0.75, 1], ylabel="time to first token, of dense (lower is better)")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title(f"Speed: shape of {report['model']}, random weights, one {report['device_name']}", fontsize=10)


def draw_loss(axes: Axes, lengths: tuple[int, ...]) -> None:
    """Points that each policy loses against dense on the same prompts, with 95 % intervals."""
    for place, length in enumerate(lengths):
        found = needles(length)
        for side, (policy, label), colour in zip((-0.3, -0.1, 0.1, 0.3), POLICIES.items(), COLOURS, strict=True):
            cases = found.get(policy, {})
            differences = [100 * (hit - found["dense"][case]) for case, hit in cases.items() if case in found["dense"]]
            axes.bar(0, 0, color=colour, label=label if place == 0 else None)
            if not differences:
                axes.text(place + side, 0.5, "not run", rotation=90, ha="center", va="bottom", fontsize=8)
                continue
            loss = share_difference_interval([difference / 100 for difference in differences])
            axes.bar(place + side, 100 * loss.mean, 0.18, color=colour)
            axes.plot([place + side] * 2, [100 * loss.low, 100 * loss.high], color="black", linewidth=1)
    axes.axhline(0, color=DENSE, linewidth=1)
    axes.set_xticks(range(len(lengths)), [f"{length // 1024}K" for length in lengths])
    axes.set_ylabel("needles found minus dense, points (higher is better)")
    axes.set_title("Accuracy: Qwen2.5-Coder-0.5B, NVIDIA H200, n 253 to 975 prompts", fontsize=10)


def needles(length: int) -> dict[str, dict[str, bool]]:
    """By policy: case to found, at a length, of prompts that all policies of a run answered."""
    found: dict[str, dict[str, bool]] = defaultdict(dict)
    for run in ("mass", "heads"):
        records: dict[str, dict[str, bool]] = defaultdict(dict)
        lines = (RESULTS / "eval" / f"qwen-{run}-needle-{length // 1024}k" / "records.jsonl").read_text().splitlines()
        for record in map(json.loads, lines):
            records[record["contender"]][record["case"]] = record["found"]
        answered = set.intersection(*map(set, records.values()))
        for policy, cases in records.items():
            if policy not in found or policy == "dense":
                found[policy].update({case: cases[case] for case in answered})
    return found


def main() -> None:
    figure = Figure(figsize=(12, 4.8), layout="constrained", dpi=130)
    left, right = figure.subplots(1, 2)
    draw_speed(left, json.loads((RESULTS / "ttft-llama-3.1-8b-h200.json").read_text()))
    draw_loss(right, (8192, 16384, 32768))
    for axes in (left, right):
        axes.set_xlabel("tokens of the prompt")
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE)
    print(f"drew {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
