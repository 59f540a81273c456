"""The report's pictures: heat maps, lines over positions, accuracy against density and time. Needs matplotlib."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from stem_attention.evaluation.scores import Column

_MARKERS = "osD^vP*X<>hd"
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.5, 2, 3, 5, 7, 10)
_FEW_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
"""For axes of more than a decade."""
_HOLLOW = "hollow: selection in eager torch"
_WIDE = 4
"""Panels next to each other."""
_FAR = 5.0
"""Median distances from dense beyond which a point would squeeze all others into a line."""


def _panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    across = min(_WIDE, count)
    down = math.ceil(count / across)
    figure = Figure(figsize=(width * across, height * down + 0.5), layout="constrained", dpi=110)
    return figure, [figure.add_subplot(down, across, place + 1) for place in range(count)]


def draw_heat(grids: Mapping[str, Mapping[tuple[float, int], float]], title: str) -> Figure:
    """Depth against length, one panel per contender, green where everything was found."""
    depths = sorted({depth for grid in grids.values() for depth, _ in grid})
    lengths = sorted({tokens for grid in grids.values() for _, tokens in grid})
    figure, panels = _panels(len(grids), max(3.2, 0.75 * len(lengths) + 1.6), 0.38 * len(depths) + 1.4)
    figure.suptitle(title)
    for axes, (name, grid) in zip(panels, grids.items(), strict=True):
        shares = [[grid.get((depth, tokens), math.nan) for tokens in lengths] for depth in depths]
        axes.imshow(shares, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        for row, line in enumerate(shares):
            for column, share in enumerate(line):
                if not math.isnan(share):
                    axes.text(column, row, f"{share:.0%}", ha="center", va="center", fontsize=8, color=_ink(share))
        axes.set_title(name, fontsize=9)
        axes.set_xticks(range(len(lengths)), [short(tokens) for tokens in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        axes.set_xlabel("tokens")
        axes.set_ylabel("depth")
    return figure


def _ink(share: float) -> str:
    """Legible on both ends of the colour map, which are dark."""
    return "black" if 0.15 < share < 0.85 else "white"


def draw_buckets(ratios: Mapping[str, Sequence[float]], ends: Sequence[int], title: str) -> Figure:
    """One line per contender over the positions; ``ends`` are the last positions of the stretches."""
    figure = Figure(figsize=(11, max(5.0, 0.21 * len(ratios) + 0.8)), layout="constrained", dpi=110)
    axes = figure.add_subplot()
    for place, (name, line) in enumerate(ratios.items()):
        axes.plot(
            range(len(line)), line, marker=_MARKERS[place % len(_MARKERS)], markersize=4, label=name, color=_colour(place)
        )
    axes.set_xticks(range(len(ends)), [f"to {end}" for end in ends])
    axes.set_xlabel("positions")
    axes.set_ylabel("perplexity over dense")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right center")
    return figure


@dataclass(frozen=True)
class Across:
    """What accuracy is drawn against.

    Attributes:
        label: Of the axis.
        places: Where contenders stand; None for their density.
        hollow: Those whose time has a selection in eager torch in it, whose markers are hollow.
    """

    label: str = "density"
    places: Mapping[str, float] | None = None
    hollow: Collection[str] = ()

    def of(self, column: Column) -> dict[str, float]:
        """Places of a column's sparse contenders, as far as they are known."""
        places = column.densities if self.places is None else self.places
        return {name: places[name] for name in column.values if name in places and column.densities[name] < 1}


def draw_pareto(columns: Sequence[Column], families: Mapping[str, str], title: str, across: Across) -> Figure:
    """Accuracy against density or time, one panel per column and one line per family; dense is the dashed line.

    Args:
        columns: Of one prompt length.
        families: By contender.
        title: Heading.
        across: What is drawn to the right.
    """
    figure, panels = _panels(len(columns), 5.2, 4.2)
    figure.suptitle(title)
    order = {family: place for place, family in enumerate(dict.fromkeys(families.values()))}
    legend: dict[str, Artist] = {}
    for axes, column in zip(panels, columns, strict=True):
        places = across.of(column)
        for family, place in order.items():
            names = [name for name in column.values if families[name] == family]
            _draw_family(axes, column, names, family, place, across)
        _leave_out_far_ones(axes, column, families, across)
        axes.set_title(column.title, fontsize=9)
        axes.set_xlabel(across.label)
        axes.set_ylabel(column.metric.axis)
        axes.set_xscale("log")
        if across.places is not None:
            axes.axvline(1.0, linestyle=":", color="0.4", label="as fast as dense")
        ticks = _ticks([*places.values(), *([] if across.places is None else [1.0])])
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        legend = {**dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True)), **legend}
    if any(name in across.hollow for column in columns for name in across.of(column)):
        legend[_HOLLOW] = Line2D([], [], linestyle="", marker="o", color="0.4", markerfacecolor="white")
    figure.legend(list(legend.values()), list(legend), loc="outside right center", fontsize=8)
    return figure


def _leave_out_far_ones(axes: Axes, column: Column, families: Mapping[str, str], across: Across) -> None:
    """Draw to the scale of the contenders near dense, and name the families of the others."""
    plot, dense = column.metric.plot, [name for name in column.values if column.densities[name] == 1]
    if not dense:
        return
    level = plot(column.estimate(dense[0]).mean)
    means = {name: plot(column.estimate(name).mean) for name in across.of(column)}
    reach = _FAR * statistics.median(abs(mean - level) for mean in means.values()) if means else 0.0
    far = [name for name, mean in means.items() if abs(mean - level) > reach]
    if not far or not reach:
        return
    near = [level, *(mean for name, mean in means.items() if name not in far)]
    margin = 0.15 * (max(near) - min(near))
    axes.set_ylim(min(near) - margin, max(near) + margin)
    counts = Counter(families[name] for name in far)
    listed = ", ".join(f"{family} ({count})" for family, count in counts.items())
    axes.text(0.98, 0.98, f"beyond: {listed}", transform=axes.transAxes, ha="right", va="top", fontsize=7)


def _ticks(places: Sequence[float]) -> list[float]:
    low, high = min(places, default=1.0) * 0.9, max(places, default=1.0) * 1.1
    return [tick for tick in (_TICKS if high < 10 * low else _FEW_TICKS) if low <= tick <= high]


def _draw_family(axes: Axes, column: Column, names: Sequence[str], family: str, place: int, across: Across) -> None:
    plot, places = column.metric.plot, across.of(column)
    dense = [name for name in names if column.densities[name] == 1]
    if dense:
        axes.axhline(plot(column.estimate(dense[0]).mean), linestyle="--", color="0.4", label=family)
    sparse = sorted((name for name in names if name in places), key=lambda name: (places[name], name))
    if not sparse:
        return
    estimates = {name: column.estimate(name) for name in sparse}
    means = {name: plot(estimate.mean) for name, estimate in estimates.items()}
    reach = [(means[name] - plot(one.low), plot(one.high) - means[name]) for name, one in estimates.items()]
    below, above = ([0.0 if math.isnan(pair[side]) else pair[side] for pair in reach] for side in (0, 1))
    marker, colour = _MARKERS[place % len(_MARKERS)], _colour(place)
    hollow = [name for name in sparse if name in across.hollow]
    axes.errorbar(
        [places[name] for name in sparse], list(means.values()), (below, above), marker=marker, elinewidth=0.6, capsize=2,
        label=family, color=colour, markerfacecolor="white" if hollow == sparse else colour,
    )  # fmt: skip
    if hollow != sparse:
        axes.plot(
            [places[name] for name in hollow], [means[name] for name in hollow], linestyle="", marker=marker, color=colour,
            markerfacecolor="white", zorder=3,
        )  # fmt: skip


def _colour(place: int) -> tuple[float, float, float, float]:
    """Ten strong colours, then ten light ones."""
    red, green, blue, alpha = colormaps["tab20"](2 * place % 20 + (place // 10) % 2)
    return red, green, blue, alpha


def short(tokens: int) -> str:
    """``8K`` for 8192."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
