"""Draw docs/assets/finetune.png from what examples/finetune_long.py --json wrote, and print the table of docs/training.md.

python benchmarks/finetune_picture.py evidence/finetune-FILE.json
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "assets" / "finetune.png"
WAYS = {"dense": "#7d8590", "sparse": "#1f6feb"}
NAMES = {"before": "not", "dense": "dense", "sparse": "sparse"}


def main(source: Path) -> None:
    """Losses of both runs on the left, what each model gives unseen windows on the right."""
    found = json.loads(source.read_text())
    facts, runs = found.pop("facts"), found
    read = {name: {way: math.exp(statistics.mean(run["unseen"][way])) for way in WAYS} for name, run in runs.items()}
    figure = Figure(figsize=(9, 3.5), layout="constrained", dpi=130)
    curves, bars = figure.subplots(1, 2)
    for side, (way, colour) in zip((-0.2, 0.2), WAYS.items(), strict=True):
        losses = runs[way]["losses"]
        curves.plot(range(1, len(losses) + 1), losses, color=colour, linewidth=1.2, label=f"trained {way}")
        for place, values in enumerate(read.values()):
            bars.bar(place + side, values[way], 0.38, color=colour, label=f"read {way}" if place == 0 else None)
            bars.text(place + side, values[way], f"{values[way]:.2f}", ha="center", va="bottom", fontsize=8)
    curves.set(xlabel="step", ylabel="loss", title=f"{facts['tokens']} tokens a step")
    bars.set_xticks(range(len(read)), ["not trained", "trained dense", "trained sparse"])
    bars.set(ylabel="perplexity of unseen windows", ylim=(0, 1.25 * max(max(values.values()) for values in read.values())))
    for axes in (curves, bars):
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE)
    print("| trained | last losses | seconds a step | GiB at most | perplexity read dense | read sparse |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, run in runs.items():
        last, seconds, peak = "", "", ""
        if "losses" in run:
            last, seconds = f"{statistics.mean(run['losses'][-10:]):.3f}", f"{run['seconds_a_step']:.2f}"
            peak = "" if run["peak_gib"] is None else f"{run['peak_gib']:.1f}"
        values = [f"{read[name][way]:.3f}" for way in WAYS]
        print(f"| {' | '.join((NAMES[name], last, seconds, peak, *values))} |")
    for way in WAYS:
        pairs = zip(runs["sparse"]["unseen"][way], runs["dense"]["unseen"][way], strict=True)
        differences = [a - b for a, b in pairs]
        spread = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
        mean = statistics.mean(differences)
        print(f"read {way}: trained sparse minus dense {mean:+.4f} nats a token, standard error {spread:.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
