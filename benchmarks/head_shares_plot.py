"""Draw docs/assets/head-shares.png: needles against density, and the factors of a calibrated file.

python benchmarks/head_shares_plot.py   (needs the distribution in evals/)
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure

from stem_attention.policies import read_policy
from stem_evals.intervals import share_difference_interval

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "evidence"
PICTURE = ROOT / "docs" / "assets" / "head-shares.png"
HEADS = RESULTS / "heads" / "qwen2.5-coder-0.5b.json"

# The needles of a length: directories, and what a reader calls their contenders.
RUNS = ("qwen-mass-needle", "qwen-second-order-needle", "qwen-heads-needle")
LINES = {
    "Stem()": (("qwen-mass-needle", "stem"),),
    "Mass, share 4, 2, 1": (
        ("qwen-mass-needle", "mass"),
        ("qwen-second-order-needle", "mass:share=2"),
        ("qwen-second-order-needle", "mass:share=1"),
    ),
    "Mass, calibrated": (("qwen-heads-needle", "mass:file=heads.json"),),
}
LENGTHS = (16384, 32768)


def point(run: str, contender: str, length: int) -> tuple[float, float, float, float]:
    """Density, points minus dense, and the ends of that interval, over the prompts that both answered."""
    cases: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for line in (RESULTS / "eval" / f"{run}-{length // 1024}k" / "records.jsonl").read_text().splitlines():
        record = json.loads(line)
        cases[record["case"]][record["contender"]] = record
    pairs = [case for case in cases.values() if {"dense", contender} <= set(case)]
    lost = share_difference_interval([float(case[contender]["found"]) - float(case["dense"]["found"]) for case in pairs])
    return fmean(case[contender]["density"] for case in pairs), 100 * lost.mean, 100 * lost.low, 100 * lost.high


def main() -> None:
    """Two panels of needles and one of factors."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, length in zip(axes, LENGTHS, strict=False):
        for name, contenders in LINES.items():
            density, points, low, high = np.array([point(run, contender, length) for run, contender in contenders]).T
            axis.errorbar(density, points, [points - low, high - points], marker="o", capsize=3, label=name)
        axis.axhspan(-2, 2, color="grey", alpha=0.15, label="within 2 points of dense")
        axis.set(title=f"One of four numbers, {length // 1024}K", xlabel="density", ylabel="found, minus dense, points")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    factors = np.log2(np.array(read_policy(str(HEADS)).head_factors))
    picture = axes[2].imshow(factors, cmap="coolwarm", vmin=-8, vmax=8, aspect="auto")
    axes[2].set(title="Factors of share", xlabel="query head", ylabel="layer")
    figure.colorbar(picture, ax=axes[2], label="log2; blue keeps more")
    figure.savefig(PICTURE, dpi=110)
    print(f"drew {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
