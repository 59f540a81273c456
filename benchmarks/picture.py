"""Draw README's picture, docs/assets/speed.png, from the results in benchmarks/results: `python benchmarks/picture.py`.

Time to first token of a whole model if that was measured (stem-attention bench --suite ttft --json), else the time of one
layer's attention.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from stem_attention.evaluation.bench_ttft_plot import plot_ttft

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PICTURE = ROOT / "benchmarks" / "results", ROOT / "docs" / "assets" / "speed.png"
WHOLE_MODEL, ONE_LAYER = RESULTS / "ttft-llama-3.1-8b-h200.json", RESULTS / "bench-attention-h200.json"
SHORTEST = 8192  # below, Stem runs dense
DENSE, OURS, INK = "#7d8590", "#1f6feb", "#24292f"


def plot_layer(report: dict[str, Any], file: Path) -> None:
    """Milliseconds against tokens, the fastest dense attention and Stem, with the ratio at each length."""
    results = [result for result in report["results"] if result["length"] >= SHORTEST]
    lengths = [result["length"] for result in results]
    dense = [1e3 * min(time for name, time in result["medians"].items() if "SDPA" in name) for result in results]
    stem = [1e3 * result["medians"]["whole"] for result in results]
    figure = Figure(figsize=(9, 4.6), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    axes.plot(lengths, dense, "o-", color=DENSE, label="dense, the fastest of cuDNN and flash")
    axes.plot(lengths, stem, "o-", color=OURS, label="Stem, selection included")
    for length, slow, fast in zip(lengths, dense, stem, strict=True):
        axes.annotate(
            f"{slow / fast:.1f}x", (length, fast), (0, -18), textcoords="offset points", ha="center", color=OURS, weight="bold"
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length // 1024}K" for length in lengths])
    axes.minorticks_off()
    axes.set_yticks([1, 10, 100], ["1 ms", "10 ms", "100 ms"])
    axes.set_ylim(min(stem) / 2.5, max(dense) * 1.6)
    axes.set_xlabel("tokens of the prompt")
    heads = f"{report['heads']}/{report['kv_heads']} heads of {report['head_dim']}"
    axes.set_title(f"Attention of one layer, {heads}, {report['dtype']}, {report['device_name']}", color=INK)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="upper left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(file)


if __name__ == "__main__":
    source, plot = (WHOLE_MODEL, plot_ttft) if WHOLE_MODEL.exists() else (ONE_LAYER, plot_layer)
    plot(json.loads(source.read_text()), PICTURE)
    print(f"drew {PICTURE.relative_to(ROOT)} from {source.relative_to(ROOT)}")
