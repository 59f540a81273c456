"""What the records of ``layers`` come to: a table for each length, and recall by layer and head as a heat map."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from stem_attention.evaluation.intervals import mean_interval
from stem_attention.evaluation.layers import LAST
from stem_attention.evaluation.measure import Record, Section, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 4
_SHOWN = 12
"""Heat maps in a picture."""


def section(records: Sequence[Record]) -> Section:
    """Tables and pictures of all records of the measure."""
    lengths = sorted({record["tokens"] for record in records})
    tables = tuple(_table([record for record in records if record["tokens"] == tokens], tokens) for tokens in lengths)
    figures = []
    for tokens in lengths:
        recalls = {name: _mean_recall(own) for name, own in _by_contender(records, tokens).items()}
        names = [name for name in recalls if name != "dense"]
        for start in range(0, len(names), _SHOWN):
            shown = {name: recalls[name] for name in names[start : start + _SHOWN]}
            figures.append((f"recall-{tokens}-{start // _SHOWN + 1}", heat_maps(shown, f"mass recall, {tokens} tokens")))
    return Section("Layers: what is kept, and what comes out", tables, tuple(figures))


def _by_contender(records: Sequence[Record], tokens: int) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        if record["tokens"] == tokens:
            groups.setdefault(record["contender"], []).append(record)
    return groups


def _mean_recall(records: Sequence[Record]) -> list[list[float]]:
    """Recall by layer and head, averaged over cases."""
    return [
        [fmean(values) for values in zip(*layers, strict=True)]
        for layers in zip(*(record["recall"] for record in records), strict=True)
    ]


def _table(records: Sequence[Record], tokens: int) -> Table:
    groups = _by_contender(records, tokens)
    first = next((name for name in groups if name != "dense"), None)
    against = {record["case"]: record["logit_error_last"] for record in groups.get(first or "", ())}
    columns = (
        "contender", "kept", "recall", "worst layer", "last block", "output error", "hidden error by quarter",
        "logits error by quarter", f"last {LAST} logits", f"minus {first}",
    )  # fmt: skip
    rows = tuple((name, *_cells(own, None if name in (first, "dense") else against)) for name, own in groups.items())
    note = (
        "Recall: share of the dense attention mass in kept blocks, on the dense model's own activations. Errors: norm of the "
        "difference from dense over the norm of dense; outputs of the heads on the dense model's activations, hidden states "
        "and logits after all layers ran sparse. The last column is the difference in the last logits' error, case by case, "
        "with its 95 % interval."
    )
    return Table(f"Layers, {tokens} tokens", columns, rows, note)


def _cells(records: Sequence[Record], against: dict[str, float] | None) -> tuple[str, ...]:
    recall = _mean_recall(records)
    shared = [] if against is None else [record for record in records if record["case"] in against]
    return (
        f"{_mean(records, 'density'):.3f}",
        f"{_overall(records, 'recall'):.4f}",
        f"{min(fmean(heads) for heads in recall):.4f}",
        f"{_overall(records, 'recall_last'):.4f}",
        f"{_overall(records, 'output_error'):.4f}",
        _quarters(records, "hidden_error"),
        _quarters(records, "logit_error"),
        _with_interval([record["logit_error_last"] for record in records]),
        _with_interval([record["logit_error_last"] - (against or {})[record["case"]] for record in shared], sign="+"),
    )


def _mean(records: Sequence[Record], field: str) -> float:
    return fmean(record[field] for record in records)


def _overall(records: Sequence[Record], field: str) -> float:
    """Mean over cases, layers and heads."""
    return fmean(value for record in records for heads in record[field] for value in heads)


def _quarters(records: Sequence[Record], field: str) -> str:
    return " ".join(f"{fmean(values):.3f}" for values in zip(*(record[field] for record in records), strict=True))


def _with_interval(values: Sequence[float], sign: str = "") -> str:
    if not values:
        return "-"
    found = mean_interval(values)
    return f"{found.mean:{sign}.4f}" + (f" ({found.low:{sign}.4f} to {found.high:{sign}.4f})" if found.count > 1 else "")


def heat_maps(recalls: dict[str, list[list[float]]], title: str) -> Figure:
    """One panel for each contender: layers down, heads across, on one scale."""
    from matplotlib.figure import Figure

    across = min(_COLUMNS, len(recalls))
    down = -(-len(recalls) // across)
    figure = Figure(figsize=(1 + 3.6 * across, 0.8 + 3.8 * down), layout="constrained", dpi=110)
    figure.suptitle(title)
    axes = [figure.add_subplot(down, across, place + 1) for place in range(len(recalls))]
    low = min(value for layers in recalls.values() for heads in layers for value in heads)
    for panel, (name, layers) in zip(axes, recalls.items(), strict=True):
        image = panel.imshow(layers, cmap="viridis", vmin=low, vmax=1, aspect="auto", interpolation="nearest")
        panel.set_title(name, fontsize=9)
        panel.set_xlabel("query head")
        panel.set_ylabel("layer")
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of dense attention mass kept")
    return figure
