"""The picture of the synthetic tasks: accuracy against length. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from stem_attention.evaluation.intervals import wilson_interval
from stem_attention.evaluation.measure import Record
from stem_attention.evaluation.report_plots import short


def draw_lengths(records: Sequence[Record]) -> Figure:
    """One panel per task, one line per contender, Wilson's 95 % intervals as bars."""
    tasks = list(dict.fromkeys(record["task"] for record in records))
    names = list(dict.fromkeys(record["contender"] for record in records))
    lengths = sorted({record["tokens"] for record in records})
    figure = Figure(figsize=(4.2 * len(tasks), 4.2), layout="constrained", dpi=110)
    for panel, task in enumerate(tasks, 1):
        axes = figure.add_subplot(1, len(tasks), panel)
        for name in names:
            found = {
                tokens: [r["found"] for r in records if (r["task"], r["tokens"], r["contender"]) == (task, tokens, name)]
                for tokens in lengths
            }
            at = [tokens for tokens in lengths if found[tokens]]
            shares = [sum(found[tokens]) / len(found[tokens]) for tokens in at]
            ends = [wilson_interval(sum(found[tokens]), len(found[tokens])) for tokens in at]
            low = [share - end[0] for share, end in zip(shares, ends, strict=True)]
            high = [end[1] - share for share, end in zip(shares, ends, strict=True)]
            axes.errorbar(at, shares, (low, high), marker="o", capsize=2, elinewidth=0.6, label=name)
        axes.set_title(task)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [short(tokens) for tokens in lengths])
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("tokens")
        axes.grid(alpha=0.3)
        if panel == 1:
            axes.set_ylabel("answers right")
            axes.legend(fontsize=7)
    return figure
