"""Draw docs/assets/block-score.png: divergence from dense against density, from evidence/block-score.jsonl.

python benchmarks/block_score_plot.py
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "evidence" / "block-score.jsonl"
PICTURE = ROOT / "docs" / "assets" / "block-score.png"

# What the records call a variant, up to its threshold or ratio, and what a reader calls it.
LINES = {
    "est=stem,alloc=head,B=128": "published score, budget a head, blocks of 128",
    "est=stem,alloc=head": "the same, blocks of 64",
    "est=pool,alloc=all,every=8": "pooled keys, budget shared by the heads",
    "est=oracle,alloc=head": "oracle, budget a head",
    "est=oracle,alloc=all": "oracle, budget shared by the heads",
    "est=stem,alloc=tau": "published score through a softmax, by mass",
    "est=pool,alloc=tau,p=16,qpool=16": "pools, by mean mass",
    "est=pool,alloc=tau,qpool=16,agg=max,tail=128": "pools, by largest mass: Mass",
    "est=oracle,alloc=tau": "oracle, by mean mass",
}
VARIED = ("tau=", "ratio=", "topp=")
PANELS = (("Qwen2.5-Coder-0.5B", 8192), ("Qwen2.5-Coder-0.5B", 32768), ("SmolLM2-135M", 8192))


def points(model: str, length: int) -> dict[str, list[tuple[float, float]]]:
    """Mean density and divergence of every variant of every line, by line."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for line in RECORDS.read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "ppl" and (record["model"], record["length"]) == (model, length):
            parts = record["policy"].split(",")
            name = ",".join(part for part in parts if not part.startswith(VARIED))
            found[name, record["policy"]].append((record["density"], record["kl"]))
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (name, _), values in found.items():
        lines[name].append((fmean(density for density, _ in values), fmean(kl for _, kl in values)))
    return {name: sorted(lines[name]) for name in LINES if name in lines}


def main() -> None:
    """Draw one panel a model and length, with the same lines in the same colours."""
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    axes = figure.subplots(1, len(PANELS), sharey=True)
    colours = {name: f"C{i}" for i, name in enumerate(LINES)}
    for axis, (model, length) in zip(axes, PANELS, strict=True):
        for name, line in points(model, length).items():
            style = "--" if name.startswith("est=oracle") else "-"
            axis.plot(*zip(*line, strict=True), style, marker="o", markersize=4, color=colours[name], label=LINES[name])
        axis.set(yscale="log", xlabel="density", title=f"{model}, {length // 1024}K")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("KL divergence from dense, nats a token")
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(PICTURE, dpi=110)
    print(f"drew {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
