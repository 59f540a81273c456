"""``stem-attention inspect``: what chosen layers and heads keep, from one prefill."""

from pathlib import Path
from typing import Annotated, Any

import torch
from rich.table import Table
from torch import Tensor

from stem_attention.cli import options
from stem_attention.cli.job import Job, prepare, read_with_progress
from stem_attention.cli.system import output, print_json, progress_console
from stem_attention.models.prefill import Reading
from stem_attention.models.views import BlockView, HeadRecorder, reach, selections_by_layer

_WIDEST = 76  # characters of a picture in text


def inspect(
    model: options.Model = None, policy: options.PolicyOption = options.MASS, prompt_file: options.PromptFile = None,
    context: options.Context = None,
    layer: Annotated[list[int] | None, options.option("Layer to show. Repeatable.", shown="first, middle and last")] = None,
    head: Annotated[list[int] | None, options.option("Query head to show. Repeatable.", shown="0")] = None,
    device: options.Device = options.AUTO, dtype: options.Dtype = options.AUTO, seed: options.Seed = 0,
    depth: options.Depth = 0.5, no_chat_template: options.NoChatTemplate = False, plot: options.Plot = None,
    panels: options.Panels = None, as_json: options.Json = False,
) -> int:  # fmt: skip
    """Show which blocks chosen layers and heads keep, as a picture and in numbers, without generating."""
    progress = progress_console()
    job = prepare(
        model, device, dtype, policy, progress, text=prompt_file, context=context, seed=seed, depth=depth,
        use_template=not no_chat_template,
    )  # fmt: skip
    layers, heads = layer or sorted({0, job.layers // 2, job.layers - 1}), head or [0]
    job.check_places(layers, heads)
    recorder = HeadRecorder(layers, heads)
    reading = read_with_progress(job, progress, job.policy, recorder)
    views = recorder.views(reading)
    if as_json:
        print_json(_report(job, reading, views))
    else:
        _print(views, f"{len(job.prompt.ids)} tokens, {len(reading.calls)} layers, mean density {reading.density:.3f}")
    if written := [str(path) for path in (plot, panels) if path is not None]:
        save_picture(job, reading, recorder, file=plot, panels=panels)
        progress.print(f"wrote {', '.join(written)}", markup=False, soft_wrap=True)
    return 0


def save_picture(job: Job, reading: Reading, recorder: HeadRecorder, *, file: Path | None, panels: Path | None = None) -> None:
    """Draw the recorded layers and heads, in one file, as a directory of panels, or both."""
    views = recorder.views(reading)
    from stem_attention.models.plots import draw

    curves = {f"kept in layer {layer}": counts for layer, counts in _kept_per_row(reading, views).items()}
    where = "{device}, {dtype}".format(**job.describe())
    title = f"{job.spec} on {Path(str(job.source)).name}, one prompt of {len(job.prompt.ids)} tokens, {where}"
    draw(title, views, curves, reach(reading), file, panels)


def _kept_per_row(reading: Reading, views: list[BlockView]) -> dict[int, list[float]]:
    """Blocks that each query block keeps in the layers shown, averaged over heads."""
    selections = selections_by_layer(reading)
    return {layer: selections[layer].counts[0].double().mean(0).tolist() for layer in sorted({view.layer for view in views})}


def _report(job: Job, reading: Reading, views: list[BlockView]) -> dict[str, Any]:
    return {
        **job.describe(),
        "layers": [
            {"layer": call.layer, "sparse": call.sparse, "reason": call.reason, "density": call.density}
            for call in reading.calls
        ],
        "views": [
            {"layer": view.layer, "head": view.head, "kept_blocks": int(view.kept.sum()), "density": view.density,
             "kept_attention": view.kept_attention, "median_distance": view.median_distance,
             "blocks": [row.nonzero().flatten().tolist() for row in view.kept]}
            for view in views
        ],
        "median_distances": [None if row[0] != row[0] else row for row in reach(reading).tolist()],
        "kept_per_row": _kept_per_row(reading, views),
    }  # fmt: skip


def _print(views: list[BlockView], summary: str) -> None:
    console = output()
    table = Table("layer", "head", "kept blocks", "density", "kept attention", "median distance")
    for view in views:
        console.print(f"layer {view.layer}, head {view.head}: query blocks down, key blocks across")
        console.print(_picture(view.kept, " '.:" if console.options.ascii_only else " ▀▄█"), markup=False, soft_wrap=True)
        places = str(view.layer), str(view.head), str(int(view.kept.sum()))
        table.add_row(*places, f"{view.density:.3f}", f"{view.kept_attention:.3f}", f"{view.median_distance:g} blocks")
    console.print(table)
    console.print(summary)


def _picture(kept: Tensor, characters: str) -> str:
    """Draw a block mask, two rows of blocks a line: none, upper, lower, both; large ones shrink and show any kept block."""
    if len(kept) > _WIDEST:
        kept = torch.nn.functional.adaptive_max_pool2d(kept[None, None].float(), _WIDEST)[0, 0].bool()
    rows = torch.nn.functional.pad(kept.int(), (0, 0, 0, len(kept) % 2))
    return "\n".join("".join(characters[place] for place in line) for line in (rows[::2] + 2 * rows[1::2]).tolist())
