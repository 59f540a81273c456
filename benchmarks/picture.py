"""Draw README's picture, docs/assets/speed.png, from evidence: `python benchmarks/picture.py`.

Left what is gained, a whole model's time to first token; right what it costs, needles that are no longer found and points lost
on RULER. Needs the distribution in evals/.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scipy import stats

from stem_evals.intervals import Estimate, share_difference_interval

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PICTURE = ROOT / "evidence", ROOT / "docs" / "assets" / "speed.png"
DENSE, MASS, MASS_SMALL, HEADS, PAPER = "#7d8590", "#1f6feb", "#9ec5fe", "#2da44e", "#cf222e"
# What is shown, the records' name of its policy, and the runs that have it, by length where there are several.
LOSSES = (
    ("Mass(), 1.5B", "mass", "qwen15-needle", MASS),
    ("Mass(), 0.5B", "mass", "qwen-mass-needle-{}k", MASS_SMALL),
    ("Mass, calibrated, 0.5B", "mass:file=heads.json", "qwen-heads-needle-{}k", HEADS),
    ("Stem.paper(), 1.5B", "paper", "qwen15-needle", PAPER),
)


def draw_speed(axes: Axes, record: dict[str, Any]) -> None:
    """Two bars a prompt, dense and sparse, relative to the dense time: real text for a trained model, then a larger shape."""
    trained = {
        run["attention"]: run["ttft_s"]
        for run in record["qwen2.5_coder_1.5b"]["runs"]
        if run["kv_cache"] == "auto" and "ttft_s" in run
    }
    times = [
        (f"1.5B\ncode\n{int(text.split()[1]) // 1000}K", dense["median"], trained["Mass()"][text]["median"])
        for text, dense in trained["FLASH_ATTN"].items()
        if text.startswith("code") and not text.endswith(" 2048")
    ]
    shape = defaultdict(dict)
    for row in record["llama_8b_shape_random_weights"]:
        if row["kv_cache"] == "auto" and row["tokens"] > 2048:
            shape[row["tokens"]][row["attention"]] = row["ttft_s"]
    times += [(f"8B\nrandom\n{n // 1024}K", row["FLASH_ATTN"], row["Mass()"]) for n, row in shape.items()]
    for place, (_, dense, sparse) in enumerate(times):
        for side, seconds, colour in ((-0.2, dense, DENSE), (0.2, sparse, MASS)):
            axes.bar(place + side, seconds / dense, 0.38, color=colour)
            shown = f"{seconds:.{1 if seconds >= 1 else 2}f} s"
            axes.text(place + side, seconds / dense + 0.01, shown, ha="center", va="bottom", fontsize=8)
        axes.text(place, 1.1, f"{dense / sparse:.2f}x\nas fast", ha="center", fontsize=9, weight="bold", color=MASS)
    for colour, label in ((DENSE, "FLASH_ATTN"), (MASS, "Mass(), the default")):
        axes.bar(0, 0, color=colour, label=label)
    axes.set_xticks(range(len(times)), [label for label, *_ in times], fontsize=9)
    axes.set(ylim=(0, 1.25), yticks=[0, 0.25, 0.5, 0.75, 1], ylabel="time to first token, of dense (lower is better)")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title(f"Speed: vLLM {record['vllm']}, one {record['device']}", fontsize=10)


def draw_loss(axes: Axes, lengths: tuple[int, ...]) -> None:
    """Points that each policy loses against dense on the same prompts, with 95 % intervals: needles, then RULER's tasks."""
    bars = [
        (place + side, needle_loss(run, policy, length), colour, label if place == 0 else None)
        for place, length in enumerate(lengths)
        for side, (label, policy, run, colour) in zip((-0.3, -0.1, 0.1, 0.3), LOSSES, strict=True)
    ]
    bars.append((len(lengths), ruler_loss(), MASS, None))
    for place, loss, colour, label in bars:
        axes.bar(place, 100 * loss.mean, 0.18, color=colour, label=label)
        axes.plot([place] * 2, [100 * loss.low, 100 * loss.high], color="black", linewidth=1)
    axes.axhline(0, color=DENSE, linewidth=1)
    ticks = [f"needles\n{length // 1024}K" for length in lengths]
    axes.set_xticks(range(len(lengths) + 1), [*ticks, "RULER\n16K"])
    axes.set_ylabel("found minus dense, points (higher is better)")
    axes.set_title("Accuracy: Qwen2.5-Coder, 95 % intervals", fontsize=10)


def needle_loss(run: str, policy: str, length: int) -> Estimate:
    """What a policy finds minus what dense finds, one of four numbers asked for."""
    found = needles(run.format(length // 1024), length)
    dense = found["dense"]
    return share_difference_interval([hit - dense[case] for case, hit in found[policy].items() if case in dense])


def ruler_loss() -> Estimate:
    """The mean of RULER's tasks with Mass() minus dense's; the interval adds up the variances within tasks."""
    scores: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for record in map(json.loads, (RESULTS / "eval" / "qwen15-ruler" / "records.jsonl").read_text().splitlines()):
        scores[record["task"]][record["contender"]] = dict(zip(record["docs"], record["sample_scores"], strict=True))
    tasks = [[score - by["dense"][doc] for doc, score in by["mass"].items() if doc in by["dense"]] for by in scores.values()]
    mean = statistics.mean(map(statistics.mean, tasks))
    error = math.sqrt(sum(stats.sem(task) ** 2 for task in tasks)) / len(tasks)
    return Estimate(mean, *map(float, stats.norm.interval(0.95, mean, error)), sum(map(len, tasks)))


def needles(run: str, length: int) -> dict[str, dict[str, bool]]:
    """By policy: case to found, at one length of a run, one of four numbers asked for."""
    found: dict[str, dict[str, bool]] = defaultdict(dict)
    for record in map(json.loads, (RESULTS / "eval" / run / "records.jsonl").read_text().splitlines()):
        if record["tokens"] == length and record["kind"] == "multikey":
            found[record["contender"]][record["case"]] = record["found"]
    return found


def main() -> None:
    figure = Figure(figsize=(12, 4.8), layout="constrained", dpi=130)
    left, right = figure.subplots(1, 2)
    draw_speed(left, json.loads((RESULTS / "vllm-h100-models.json").read_text()))
    draw_loss(right, (8192, 16384, 32768))
    for axes in (left, right):
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE)
    print(f"drew {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
