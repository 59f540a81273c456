"""Draw a selection: kept blocks, where attention goes, blocks per row, how far heads look. Needs matplotlib."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from stem_attention.models.views import BlockView

_KEPT = ListedColormap(["#e8ebef", "#1f5fa8"])
_LEAST = 1e-5  # share of attention below which blocks look alike
_WIDTH, _HEIGHT = 5.2, 4.4  # inches of a panel


def draw(
    title: str, views: list[BlockView], curves: dict[str, list[float]], reach: Tensor, file: Path | None, directory: Path | None
) -> None:
    """Write two panels for each view, then blocks per row and reach: all in one PNG, each in one of a directory, or both.

    ``curves`` are blocks kept per query block, by name; ``reach`` is as :func:`stem_attention.models.views.reach` returns it.
    """
    parts = {}
    for view in views:
        parts[f"layer{view.layer}-head{view.head}-kept"] = partial(_draw_kept, view=view)
        parts[f"layer{view.layer}-head{view.head}-attention"] = partial(_draw_attention, view=view)
    parts.update(rows=partial(_draw_curves, curves=curves), reach=partial(_draw_reach, reach=reach))
    if file is not None:
        figure = _draw(list(parts.values()), across=2)
        figure.suptitle(title)
        figure.savefig(file)
    if directory is not None:
        for name, part in parts.items():
            _draw([part], across=1).savefig(directory / f"{name}.png")


def _draw(parts: list[Callable[[Axes, Axes], None]], across: int) -> Figure:
    """Draw panels that are equally large, each with a place beside it for its scale, which some have no use for."""
    lines = len(parts) // across
    figure = Figure(figsize=(across * _WIDTH, lines * _HEIGHT), layout="constrained", dpi=120)
    cells = figure.subplots(lines, 2 * across, squeeze=False, width_ratios=[24, 1] * across).flat
    for part in parts:
        part(next(cells), next(cells))
    return figure


def _draw_kept(axes: Axes, scale: Axes, view: BlockView) -> None:
    image = axes.imshow(
        view.kept.float().where(~view.attention.isnan(), float("nan")).numpy(),
        cmap=_KEPT, vmin=0, vmax=1, aspect="auto", interpolation="nearest",
    )  # fmt: skip
    bar = axes.figure.colorbar(image, cax=scale, ticks=[0.25, 0.75])
    bar.set_ticklabels(["dropped", "kept"], rotation=90, va="center")
    title = f"layer {view.layer}, head {view.head}: kept blocks\n{view.density:.1%} of the blocks, "
    _label(axes, f"{title}{view.kept_attention:.1%} of the attention", "key block", "query block")


def _draw_attention(axes: Axes, scale: Axes, view: BlockView) -> None:
    shares = view.attention.clamp(min=_LEAST).numpy()  # NaN, the future, stays white
    image = axes.imshow(shares, cmap="viridis", norm=LogNorm(_LEAST, 1), aspect="auto", interpolation="nearest")
    axes.figure.colorbar(image, cax=scale, extend="min", label="share of the query block's attention")
    _label(axes, f"layer {view.layer}, head {view.head}: dense attention", "key block", "query block")


def _draw_curves(axes: Axes, scale: Axes, curves: dict[str, list[float]]) -> None:
    scale.set_axis_off()
    rows = max(len(curve) for curve in curves.values())
    axes.plot(range(rows), range(1, rows + 1), color="0.6", linestyle=":", label="all causal blocks")
    for index, (name, curve) in enumerate(curves.items()):  # thinner and thinner, so that equal curves all show
        width = 1.5 + 1.5 * (len(curves) - 1 - index)
        axes.plot(range(len(curve)), curve, label=name, linewidth=width, drawstyle="steps-mid")
    _label(axes, "blocks kept per query block", "query block", "blocks")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_reach(axes: Axes, scale: Axes, reach: Tensor) -> None:
    image = axes.imshow(reach.T.numpy(), cmap="magma", vmin=0, aspect="auto", interpolation="nearest")
    axes.figure.colorbar(image, cax=scale, label="blocks")
    _label(axes, "median distance of a kept block from the diagonal", "layer", "head")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize="medium")
    axes.set(xlabel=x, ylabel=y)
