"""The pictures: kept blocks, block scores and the budget curve. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from stem_attention.evaluation.views import BlockView

_KEPT = ListedColormap(["#e8ebef", "#1f5fa8"])
_FUTURE = "white"


def plot_views(views: list[BlockView], curves: dict[str, list[float]], title: str, file: Path) -> None:
    """Write a PNG: a row of two panels per view (kept blocks, scores), and the budget curves on the right.

    Args:
        views: At least one.
        curves: Blocks kept per query block, by name.
        title: Heading.
        file: Where to write.
    """
    figure = Figure(figsize=(15, 0.8 + 4.4 * len(views)), layout="constrained", dpi=130)
    figure.suptitle(title)
    grid = figure.add_gridspec(len(views), 3)
    for line, view in enumerate(views):
        _draw_kept(figure.add_subplot(grid[line, 0]), view)
        _draw_scores(figure, figure.add_subplot(grid[line, 1]), view)
    _draw_curves(figure.add_subplot(grid[0, 2]), curves)
    figure.savefig(file)


def _draw_kept(axes: Axes, view: BlockView) -> None:
    axes.imshow(view.kept.float().where(~view.scores.isnan(), float("nan")).numpy(), cmap=_KEPT, vmin=0, vmax=1)
    axes.set_title(f"layer {view.layer}, head {view.head}: kept blocks, density {view.density:.3f}")
    _name_axes(axes)


def _draw_scores(figure: Figure, axes: Axes, view: BlockView) -> None:
    known = view.scores[~view.scores.isnan()].double()
    low, high = known.quantile(0.01).item(), known.quantile(0.99).item()  # a few extremes would flatten the rest
    image = axes.imshow(view.scores.numpy(), cmap="viridis", vmin=low, vmax=high)
    figure.colorbar(image, ax=axes, shrink=0.8, extend="both")
    axes.set_title(f"layer {view.layer}, head {view.head}: block scores")
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
    axes.set_title("blocks kept per query block")
    axes.set_xlabel("query block")
    axes.set_ylabel("blocks")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
