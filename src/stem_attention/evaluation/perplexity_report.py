"""What perplexity's records come to: one table of totals, one by position, and lines over the positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median

from stem_attention.evaluation.intervals import mean_interval
from stem_attention.evaluation.measure import Record, Section, Table

Cell = tuple[str, int, str]
"""Text, tokens and contender."""


def section(records: Sequence[Record]) -> Section:
    """The report's part about perplexity."""
    cells: dict[Cell, list[Record]] = {}
    for record in records:
        cells.setdefault((record["text"], record["tokens"], record["contender"]), []).append(record)
    from stem_attention.evaluation.report_plots import draw_buckets

    places = list(dict.fromkeys((text, tokens) for text, tokens, _ in cells))
    figures = [
        (
            f"perplexity-{text}-{tokens}",
            draw_buckets(
                {name: _bucket_ratios(part) for (*place, name), part in cells.items() if place == [text, tokens]},
                [bucket["last"] for bucket in cells[next(cell for cell in cells if cell[:2] == (text, tokens))][0]["buckets"]],
                f"{text}, {tokens} tokens: perplexity over dense by position",
            ),
        )
        for text, tokens in places
    ]
    return Section("Perplexity", (_totals(cells), _by_position(cells)), tuple(figures))


def _totals(cells: dict[Cell, list[Record]]) -> Table:
    rows = []
    for (text, tokens, name), part in cells.items():
        ratio = mean_interval([record["loss"] - record["dense_loss"] for record in part])
        kl, same = (mean_interval([record[field] for record in part]) for field in ("kl", "same"))
        rows.append((
            text, str(tokens), name, f"{fmean(record['density'] for record in part):.3f}",
            f"{math.exp(fmean(record['loss'] for record in part)):.3f}",
            ratio.text(lambda x: f"{math.exp(x):.4f}"),
            kl.text(lambda x: f"{max(x, 0.0):.4f}"),
            same.text(lambda x: f"{min(x, 1.0):.1%}"),
            f"{median(record['seconds'] for record in part):.2f}", str(len(part)),
        ))  # fmt: skip
    columns = (
        "text", "tokens", "contender", "density", "perplexity", "over dense", "KL from dense", "same top token", "seconds",
        "windows",
    )  # fmt: skip
    note = "Intervals: 95 %, Student's t over windows; over dense is paired, window by window. KL in nats per token."
    return Table("Whole windows", columns, tuple(rows), note)


def _by_position(cells: dict[Cell, list[Record]]) -> Table:
    count = len(next(iter(cells.values()))[0]["buckets"])
    rows = [
        (text, str(tokens), name, f"{fmean(record['density'] for record in part):.3f}",
         *(mean_interval(_bucket(part, index)).text(lambda x: f"{math.exp(x):.4f}") for index in range(count)), str(len(part)))
        for (text, tokens, name), part in cells.items()
        if any(record["density"] < 1 for record in part)
    ]  # fmt: skip
    shares = (f"{index}/{count} to {index + 1}/{count}" for index in range(count))
    return Table(
        "Perplexity over dense, by position",
        ("text", "tokens", "contender", "density", *shares, "windows"),
        tuple(rows),
        "Each window is cut into equal stretches of positions.",
    )


def _bucket(part: list[Record], index: int) -> list[float]:
    buckets = [record["buckets"][index] for record in part]
    return [bucket["loss"] - bucket["dense_loss"] for bucket in buckets]


def _bucket_ratios(part: list[Record]) -> list[float]:
    return [math.exp(fmean(_bucket(part, index))) for index in range(len(part[0]["buckets"]))]
