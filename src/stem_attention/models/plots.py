"""Draw a selection: kept blocks, where attention goes, blocks per row, how far heads look. Needs matplotlib."""

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
        lines = len(parts) // 2
        figure = Figure(figsize=(2 * _WIDTH, lines * _HEIGHT), layout="constrained", dpi=120)
        figure.suptitle(title)
        for part, axes in zip(parts.values(), figure.subplots(lines, 2).flat, strict=True):
            part(axes)
        figure.savefig(file)
    if directory is not None:
        for name, part in parts.items():
            figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained", dpi=120)
            part(figure.subplots())
            figure.savefig(directory / f"{name}.png")


def _draw_kept(axes: Axes, view: BlockView) -> None:
    axes.imshow(view.kept.float().where(~view.attention.isnan(), float("nan")).numpy(), cmap=_KEPT, vmin=0, vmax=1)
    title = f"layer {view.layer}, head {view.head}: kept blocks\n{view.density:.1%} of the blocks, "
    _label(axes, f"{title}{view.kept_attention:.1%} of the attention", "key block", "query block")


def _draw_attention(axes: Axes, view: BlockView) -> None:
    shares = view.attention.clamp(min=_LEAST).numpy()  # NaN, the future, stays white
    image = axes.imshow(shares, cmap="viridis", norm=LogNorm(_LEAST, 1))
    axes.figure.colorbar(image, ax=axes, shrink=0.8, extend="min", label="share of the query block's attention")
    _label(axes, f"layer {view.layer}, head {view.head}: dense attention", "key block", "query block")


def _draw_curves(axes: Axes, curves: dict[str, list[float]]) -> None:
    rows = max(len(curve) for curve in curves.values())
    axes.plot(range(rows), range(1, rows + 1), color="0.6", linestyle=":", label="all causal blocks")
    for index, (name, curve) in enumerate(curves.items()):  # thinner and thinner, so that equal curves all show
        width = 1.5 + 1.5 * (len(curves) - 1 - index)
        axes.plot(range(len(curve)), curve, label=name, linewidth=width, drawstyle="steps-mid")
    _label(axes, "blocks kept per query block", "query block", "blocks")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_reach(axes: Axes, reach: Tensor) -> None:
    image = axes.imshow(reach.T.numpy(), cmap="magma", vmin=0, aspect="auto", interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, label="blocks")
    _label(axes, "median distance of a kept block from the diagonal", "layer", "head")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize="medium")
    axes.set(xlabel=x, ylabel=y)
