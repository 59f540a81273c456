"""The report's pictures: heat maps, and accuracy against density and time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from stem_evals.contender import DENSE
from stem_evals.scores import Column

_MARKERS = "osD^vP*X<>hd"
_COLOURS = [colormaps["tab20"](place) for place in (*range(0, 20, 2), *range(1, 20, 2))]
_HOLLOW = "hollow: selection in eager torch"
_WIDE = 4
"""Panels next to each other."""
_FAR = 5.0
"""Median distances from dense beyond which a point would squeeze all others into a line."""


def _panels(count: int, width: float, height: float, title: str) -> tuple[Figure, list[Axes]]:
    across = min(_WIDE, count)
    down = math.ceil(count / across)
    figure = Figure(figsize=(width * across, height * down + 0.5), layout="constrained", dpi=110)
    figure.suptitle(title)
    return figure, [figure.add_subplot(down, across, place + 1) for place in range(count)]


def draw_grids(
    grids: Mapping[str, pd.DataFrame], title: str, colours: str, low: float | None = None, *, cells: bool = False
) -> Figure:
    """One heat map a contender, on one scale that ends at 1; the axes are what the frames call their index and columns.

    Args:
        grids: By contender.
        title: Heading.
        colours: matplotlib's name of a colour map.
        low: Where the scale begins; the least value unless given.
        cells: Whether the maps are small enough to have their values written into them, in per cent.
    """
    rows, across = next(iter(grids.values())).shape
    width, height = (max(3.2, 0.75 * across + 1.6), 0.38 * rows + 1.4) if cells else (3.8, 3.8)
    figure, panels = _panels(len(grids), width, height, title)
    low = min(float(np.nanmin(grid)) for grid in grids.values()) if low is None else low
    for axes, (name, grid) in zip(panels, grids.items(), strict=True):
        image = axes.imshow(grid, cmap=colours, vmin=low, vmax=1, aspect="auto", interpolation="nearest")
        axes.set_title(name, fontsize=9)
        axes.set(xlabel=grid.columns.name, ylabel=grid.index.name)
        if not cells:
            axes.locator_params(integer=True)
            continue
        axes.set_xticks(range(across), [short(tokens) for tokens in grid.columns])
        axes.set_yticks(range(rows), [f"{depth:g}" for depth in grid.index])
        for (row, column), share in np.ndenumerate(grid.to_numpy()):
            ink = "black" if 0.15 < share < 0.85 else "white"  # legible on both ends of the colour map, which are dark
            axes.text(column, row, "" if np.isnan(share) else f"{share:.0%}", ha="center", va="center", fontsize=8, color=ink)
    if not cells:
        figure.colorbar(image, ax=panels, shrink=0.8)
    return figure


def draw_pareto(
    columns: Sequence[Column],
    families: Mapping[str, str],
    title: str,
    times: Mapping[str, float] | None = None,
    hollow: Collection[str] = (),
) -> Figure:
    """Accuracy against density or time, one panel a column and one line a family; dense is the dashed line.

    Args:
        columns: Of one prompt length.
        families: By contender.
        title: Heading.
        times: Attention time over dense's by contender; None draws against density.
        hollow: Contenders whose time has a selection in eager torch in it.
    """
    figure, panels = _panels(len(columns), 5.2, 4.2, title)
    order = {family: place for place, family in enumerate(dict.fromkeys(families.values()))}
    legend: dict[str, Artist] = {}
    for axes, column in zip(panels, columns, strict=True):
        _draw_column(axes, column, families, order, times, hollow)
        legend |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if hollow:
        legend[_HOLLOW] = Line2D([], [], linestyle="", marker="o", color="0.4", markerfacecolor="white")
    figure.legend(list(legend.values()), list(legend), loc="outside right center", fontsize=8)
    return figure


def _draw_column(
    axes: Axes, column: Column, families: Mapping[str, str], order: Mapping[str, int], times: Mapping[str, float] | None,
    hollow: Collection[str],
) -> None:  # fmt: skip
    plot, at = column.metric.plot, column.densities if times is None else times
    level = next((plot(column.estimate(name).mean) for name in column.values if families[name] == DENSE), None)
    if level is not None:
        axes.axhline(level, linestyle="--", color="0.4", label=DENSE)
    if times is not None:
        axes.axvline(1.0, linestyle=":", color="0.4", label="as fast as dense")
    means: dict[str, float] = {}
    for family, place in order.items():
        names = sorted((name for name in column.sparse if name in at and families[name] == family), key=lambda name: at[name])
        if not names:
            continue
        found = [column.estimate(name) for name in names]
        means |= {name: plot(one.mean) for name, one in zip(names, found, strict=True)}
        reach = np.nan_to_num([[plot(one.mean) - plot(one.low), plot(one.high) - plot(one.mean)] for one in found]).clip(0)
        style: dict[str, Any] = {"marker": _MARKERS[place % len(_MARKERS)], "color": _COLOURS[place % len(_COLOURS)]}
        places, heights = [at[name] for name in names], [means[name] for name in names]
        axes.errorbar(places, heights, reach.T, elinewidth=0.6, capsize=2, label=family, **style)
        eager = [name for name in names if name in hollow]
        places, heights = [at[name] for name in eager], [means[name] for name in eager]
        axes.plot(places, heights, linestyle="", markerfacecolor="white", zorder=3, **style)
    _leave_out_far_ones(axes, means, level, families)
    axes.set_title(f"{column.title}, n {len(column.values)}", fontsize=9)
    label = "density" if times is None else "attention time over dense's, selection included (lower is better)"
    better = "higher" if column.metric.higher else "lower"
    axes.set(xlabel=label, ylabel=f"{column.metric.label}{column.metric.unit} ({better} is better)", xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6) if times is None else (1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, place: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)


def _leave_out_far_ones(axes: Axes, means: Mapping[str, float], level: float | None, families: Mapping[str, str]) -> None:
    """Draw to the scale of the contenders near dense, and name the families of the others."""
    if level is None or not means:
        return
    reach = _FAR * median(abs(mean - level) for mean in means.values())
    far = [name for name, mean in means.items() if abs(mean - level) > reach]
    if not far or not reach:
        return
    near = [level, *(mean for name, mean in means.items() if name not in far)]
    margin = 0.15 * (max(near) - min(near))
    axes.set_ylim(min(near) - margin, max(near) + margin)
    listed = ", ".join(f"{family} ({count})" for family, count in Counter(families[name] for name in far).items())
    axes.text(0.98, 0.98, f"beyond: {listed}", transform=axes.transAxes, ha="right", va="top", fontsize=7)


def short(tokens: int) -> str:
    """``8K`` for 8192."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
