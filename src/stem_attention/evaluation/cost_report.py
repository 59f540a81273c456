"""What the records of ``cost`` come to: a table of times, and every contender's time over dense's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from stem_attention.evaluation.intervals import Estimate, mean_interval
from stem_attention.evaluation.measure import Record, Section, Table

DENSE = "dense"
EAGER = "eager torch"

Place = tuple[int, str]
"""Tokens and contender."""


@dataclass(frozen=True)
class RelativeCost:
    """A contender's attention time, selection included, over dense's.

    Attributes:
        ratio: Mean over the windows that both ran on the same device.
        fused: Whether the library's kernels chose the blocks; otherwise eager torch did, and a kernel would be faster.
    """

    ratio: Estimate
    fused: bool

    @property
    def text(self) -> str:
        """As a cell of a table."""
        return self.ratio.text("{:.3f}".format) + ("" if self.fused else f", {EAGER}")


def relative_costs(records: Sequence[Record]) -> dict[Place, RelativeCost]:
    """Costs of all contenders that have a window in common with dense, dense itself included.

    Args:
        records: Of the measure ``cost``.
    """
    dense = {(record["case"], record["device"]): record["whole_ms"] for record in records if record["contender"] == DENSE}
    found = {}
    for place, part in _by_place(records).items():
        places = [(record["case"], record["device"]) for record in part]
        ratios = [record["whole_ms"] / dense[at] for record, at in zip(part, places, strict=True) if at in dense]
        if ratios:
            found[place] = RelativeCost(mean_interval(ratios), all(record["fused"] for record in part))
    return found


def section(records: Sequence[Record]) -> Section:
    """The report's part about cost."""
    costs = relative_costs(records)
    rows = tuple(_row(place, part, costs.get(place)) for place, part in sorted(_by_place(records).items(), key=_tokens))
    columns = (
        "tokens", "contender", "density", "selection, ms", "attention, ms", "whole, ms", "over dense", "selection by",
        "windows",
    )  # fmt: skip
    return Section("Cost of attention", (Table("Attention time of a prompt", columns, rows, _NOTE),))


_NOTE = (
    "Sums over the layers, on the inputs that a dense prefill gives each of them; medians of a few rounds, means over windows. "
    "Dense is the fastest dense attention of the machine, over dense the mean ratio window by window with its 95 % interval. "
    "Where the library's kernels choose, whole is one call that chooses and attends; where eager torch does, it is the sum, "
    "which says nothing about how fast that choice could be made."
)


def _tokens(item: tuple[Place, list[Record]]) -> int:
    return item[0][0]


def _by_place(records: Sequence[Record]) -> dict[Place, list[Record]]:
    places: dict[Place, list[Record]] = {}
    for record in records:
        places.setdefault((record["tokens"], record["contender"]), []).append(record)
    return places


def _row(place: Place, part: list[Record], cost: RelativeCost | None) -> tuple[str, ...]:
    tokens, name = place
    times = (f"{fmean(record[field] for record in part):.2f}" for field in ("selection_ms", "attention_ms", "whole_ms"))
    ratio = "" if cost is None else cost.ratio.text("{:.3f}".format)
    return (
        str(tokens),
        name,
        f"{fmean(record['density'] for record in part):.3f}",
        *times,
        ratio,
        _chooser(part),
        str(len(part)),
    )


def _chooser(part: list[Record]) -> str:
    """Who chose the blocks; of dense layers alone, what attended."""
    if all(record["density"] == 1 and not record["selection_ms"] for record in part):
        return "nothing to select: " + ", ".join(
            sorted({min(record["dense_ms"], key=record["dense_ms"].get) for record in part})
        )
    return "kernels" if all(record["fused"] for record in part) else EAGER
