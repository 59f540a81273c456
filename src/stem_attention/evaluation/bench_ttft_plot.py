"""The picture of time to first token against length, dense and with Stem. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from stem_attention.evaluation.bench_ttft_contestants import STEM

_REST, _DENSE, _OURS, _INK = "#d0d4da", "#7d8590", "#1f6feb", "#24292f"
_WIDTH = 0.4


def plot_ttft(report: dict[str, Any], file: Path) -> None:
    """Draw what ``stem-attention bench --suite ttft --json`` printed: two bars a length, attention apart from the rest.

    Bars are relative to the fastest dense prefill of their length, so that short prompts can be seen beside long ones; the
    seconds stand above them. Lengths at which no dense prefill ran have no bars.

    Args:
        report: The JSON object.
        file: PNG or SVG to write.
    """
    results = [result for result in sorted(report["results"], key=lambda result: int(result["length"])) if result["ratios"]]
    figure = Figure(figsize=(9, 4.6), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    top = 0.25 + max((1 / min(1.0, result["ratios"]["total"]) for result in results), default=1.0)
    for place, result in enumerate(results):
        dense = min((t for name, t in result["timings"].items() if name != STEM), key=lambda timing: float(timing["seconds"]))
        ours, last = result["timings"][STEM], place == len(results) - 1
        _bar(axes, place - _WIDTH / 2, dense, dense["seconds"], _DENSE, "attention, dense" if last else None)
        _bar(axes, place + _WIDTH / 2, ours, dense["seconds"], _OURS, "attention, Stem" if last else None)
        ratio = result["ratios"]["total"]
        axes.text(place, top - 0.12, f"{ratio:.2f}x", ha="center", fontsize=12, fontweight="bold", color=_OURS)
    axes.bar([0], [0], color=_REST, label="the rest of the model")
    axes.set_xticks(range(len(results)), [_short(result["length"]) for result in results])
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylim(0, top)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title(f"Time to first token, {report['model']}, {report['dtype']}, {report['device_name']}", color=_INK)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(file)


def _bar(axes: Axes, x: float, timing: dict[str, Any], whole: float, colour: str, label: str | None) -> None:
    height, parts = timing["seconds"] / whole, timing["parts"]
    attention = height * parts["attention"] / parts["total"]
    axes.bar([x], [height - attention], _WIDTH * 0.94, color=_REST)
    axes.bar([x], [attention], _WIDTH * 0.94, bottom=[height - attention], color=colour, label=label)
    axes.text(x, height + 0.015, _duration(timing["seconds"]), ha="center", fontsize=8, color=_INK)


def _short(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"
