"""The pictures of a selection: kept blocks, block scores, the budget curve, how far heads look. Needs matplotlib."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from stem_attention.evaluation.views import BlockView

_KEPT = ListedColormap(["#e8ebef", "#1f5fa8"])
_FUTURE = "white"


@dataclass(frozen=True, eq=False)
class Picture:
    """What there is to draw of one prefill.

    Attributes:
        title: Heading.
        views: Layers and heads to show, at least one.
        curves: Blocks kept per query block, by name.
        reach: Median distance of the kept blocks, ``(layers, heads)``; NaN where a layer ran dense.
    """

    title: str
    views: list[BlockView]
    curves: dict[str, list[float]]
    reach: Tensor


def plot_picture(picture: Picture, file: Path) -> None:
    """Write everything as one PNG: a row of two panels per view, the budget curves and the reach on the right."""
    lines = len(picture.views)
    figure = Figure(figsize=(15, 0.8 + 4.4 * max(lines, 1.6)), layout="constrained", dpi=130)
    figure.suptitle(picture.title)
    grid = figure.add_gridspec(1, 2, width_ratios=(2, 1))
    left, right = grid[0].subgridspec(lines, 2), grid[1].subgridspec(2, 1)
    for line, view in enumerate(picture.views):
        _draw_kept(figure, figure.add_subplot(left[line, 0]), view)
        _draw_scores(figure, figure.add_subplot(left[line, 1]), view)
    _draw_curves(figure.add_subplot(right[0]), picture.curves)
    _draw_reach(figure, figure.add_subplot(right[1]), picture.reach)
    figure.savefig(file)


def plot_panels(picture: Picture, directory: Path) -> None:
    """Write every panel as a PNG of its own: ``budget``, ``reach``, and ``layer6-head4-kept`` and ``-scores`` for each view."""
    for view in picture.views:
        for name, draw in (("kept", _draw_kept), ("scores", _draw_scores)):
            figure = Figure(figsize=(4.8, 4.2), layout="constrained", dpi=130)
            draw(figure, figure.add_subplot(), view)
            figure.savefig(directory / f"layer{view.layer}-head{view.head}-{name}.png")
    figure = Figure(figsize=(7, 4), layout="constrained", dpi=130)
    _draw_curves(figure.add_subplot(), picture.curves)
    figure.savefig(directory / "budget.png")
    figure = Figure(figsize=(7, 4), layout="constrained", dpi=130)
    _draw_reach(figure, figure.add_subplot(), picture.reach)
    figure.savefig(directory / "reach.png")


def _draw_kept(_: Figure, axes: Axes, view: BlockView) -> None:
    axes.imshow(view.kept.float().where(~view.scores.isnan(), float("nan")).numpy(), cmap=_KEPT, vmin=0, vmax=1)
    axes.set_title(f"layer {view.layer}, head {view.head}: kept blocks, density {view.density:.3f}", fontsize="medium")
    _name_axes(axes)


def _draw_scores(figure: Figure, axes: Axes, view: BlockView) -> None:
    known = view.scores[~view.scores.isnan()].double()
    low, high = known.quantile(0.01).item(), known.quantile(0.99).item()  # a few extremes would flatten the rest
    image = axes.imshow(view.scores.numpy(), cmap="viridis", vmin=low, vmax=high)
    figure.colorbar(image, ax=axes, shrink=0.8, extend="both")
    axes.set_title(f"layer {view.layer}, head {view.head}: block scores", fontsize="medium")
    _name_axes(axes)


def _name_axes(axes: Axes) -> None:
    axes.set_facecolor(_FUTURE)
    axes.set_xlabel("key block")
    axes.set_ylabel("query block")


def _draw_curves(axes: Axes, curves: dict[str, list[float]]) -> None:
    rows = max(len(curve) for curve in curves.values())
    axes.plot(range(rows), range(1, rows + 1), color="0.6", linestyle=":", label="all causal blocks")
    for index, (name, curve) in enumerate(curves.items()):  # thinner and thinner, so that equal curves all show
        width = 1.5 + 1.5 * (len(curves) - 1 - index)
        axes.plot(range(len(curve)), curve, label=name, linewidth=width, drawstyle="steps-mid")
    axes.set_title("blocks kept per query block", fontsize="medium")
    axes.set_xlabel("query block")
    axes.set_ylabel("blocks")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_reach(figure: Figure, axes: Axes, reach: Tensor) -> None:
    image = axes.imshow(reach.T.numpy(), cmap="magma", vmin=0, aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axes, label="blocks")
    axes.set_title("median distance of a kept block from the diagonal", fontsize="medium")
    axes.set_xlabel("layer")
    axes.set_ylabel("head")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
