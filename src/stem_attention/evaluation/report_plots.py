"""The report's pictures: heat maps, lines over positions, accuracy against density. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stem_attention.evaluation.scores import Column

_MARKERS = "osD^vP*X<>hd"
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
_WIDE = 4
"""Panels next to each other."""


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


def draw_pareto(columns: Sequence[Column], families: Mapping[str, str], title: str) -> Figure:
    """Accuracy against density, one panel per column and one line per family; dense is the dashed line.

    Args:
        columns: Of one prompt length.
        families: By contender.
        title: Heading.
    """
    figure, panels = _panels(len(columns), 5.2, 4.2)
    figure.suptitle(title)
    order = {family: place for place, family in enumerate(dict.fromkeys(families.values()))}
    for axes, column in zip(panels, columns, strict=True):
        for family, place in order.items():
            names = [name for name in column.values if families[name] == family]
            _draw_family(axes, column, names, family, place)
        axes.set_title(column.title, fontsize=9)
        axes.set_xlabel("density")
        axes.set_ylabel(column.metric.axis)
        axes.set_xscale("log")
        kept = [density for density in column.densities.values() if density < 1]
        ticks = [tick for tick in _TICKS if min(kept, default=1) * 0.9 <= tick <= max(kept, default=1) * 1.1]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def _draw_family(axes: Axes, column: Column, names: Sequence[str], family: str, place: int) -> None:
    points = sorted((column.densities[name], name) for name in names)
    plot = column.metric.plot
    dense = [name for density, name in points if density == 1]
    if dense:
        axes.axhline(plot(column.estimate(dense[0]).mean), linestyle="--", color="0.4", label=family)
    sparse = [(density, column.estimate(name)) for density, name in points if density < 1]
    if not sparse:
        return
    means = [plot(estimate.mean) for _, estimate in sparse]
    reach = [(plot(estimate.mean) - plot(estimate.low), plot(estimate.high) - plot(estimate.mean)) for _, estimate in sparse]
    below, above = ([0.0 if math.isnan(pair[side]) else pair[side] for pair in reach] for side in (0, 1))
    axes.errorbar(
        [density for density, _ in sparse], means, (below, above), marker=_MARKERS[place % len(_MARKERS)],
        elinewidth=0.6, capsize=2, label=family, color=_colour(place),
    )  # fmt: skip


def _colour(place: int) -> tuple[float, float, float, float]:
    """Ten strong colours, then ten light ones."""
    red, green, blue, alpha = colormaps["tab20"](2 * place % 20 + (place // 10) % 2)
    return red, green, blue, alpha


def short(tokens: int) -> str:
    """``8K`` for 8192."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
