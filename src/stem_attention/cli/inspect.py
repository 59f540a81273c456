"""``stem-attention inspect``: what chosen layers and heads keep, from one prefill."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from stem_attention.cli.job import Job, JobOptions, prepare, read_with_progress
from stem_attention.cli.options import check_panels
from stem_attention.cli.pictures import save_picture, text_picture, views_or_error
from stem_attention.cli.system import output, progress_console
from stem_attention.evaluation.prefill import Reading
from stem_attention.evaluation.views import BlockView, HeadRecorder, reach, row_counts, selections_by_layer


def inspect_command(options: JobOptions, *, panels: Path | None, as_json: bool) -> int:
    """Prefill once and show; returns the exit code.

    Raises:
        UserError: Some option is wrong, or none of the chosen layers ran sparse.
        UnsupportedError: The model's class cannot take Stem's attention function.
    """
    progress = progress_console()
    if panels is not None:
        check_panels(panels)
    job = prepare(options, progress)
    layers = job.layers or sorted({0, job.layer_count // 2, job.layer_count - 1})
    recorder = HeadRecorder(layers, job.heads, job.choice.config)
    reading = read_with_progress(job, progress, dense=False, recorder=recorder)
    views = views_or_error(reading, recorder)
    if as_json:
        print(json.dumps(_to_json(job, reading, views)))
    else:
        _print(job, reading, views, output())
    if written := [path for path in (options.plot, panels) if path is not None]:
        save_picture(job, reading, recorder, file=options.plot, panels=panels)
        progress.print(f"wrote {', '.join(map(str, written))}", markup=False)
    return 0


def _to_json(job: Job, reading: Reading, views: list[BlockView]) -> dict[str, Any]:
    selections = selections_by_layer(reading)
    return {
        **job.describe(),
        "layers": [
            {"layer": call.layer, "sparse": call.sparse, "reason": call.reason,
             "density": call.density}
            for call in reading.calls
        ],
        "views": [
            {"layer": view.layer, "head": view.head, "kept_blocks": view.kept_blocks, "density": view.density,
             "median_distance": view.median_distance, "blocks": [row.nonzero().flatten().tolist() for row in view.kept]}
            for view in views
        ],
        "median_distances": [None if math.isnan(row[0]) else row for row in reach(reading).tolist()],
        "kept_per_row": {str(layer): row_counts(selections[layer]) for layer in sorted({view.layer for view in views})},
    }  # fmt: skip


def _print(job: Job, reading: Reading, views: list[BlockView], console: Console) -> None:
    for view in views:
        console.print(f"layer {view.layer}, head {view.head}: query blocks down, key blocks across")
        console.print(text_picture(view.kept), markup=False, soft_wrap=True)
    table = Table("layer", "head", "kept blocks", "density", "median distance")
    for view in views:
        distance = f"{view.median_distance:g} blocks"
        table.add_row(str(view.layer), str(view.head), str(view.kept_blocks), f"{view.density:.3f}", distance)
    console.print(table)
    selections = selections_by_layer(reading)
    counts = {layer: row_counts(selections[layer]) for layer in sorted({view.layer for view in views})}
    budget = Table("query block", "causal", *(f"kept in layer {layer}" for layer in counts))
    rows = len(next(iter(counts.values())))
    for row in sorted({*range(0, rows, max(1, rows // 12)), rows - 1}):
        budget.add_row(str(row), str(row + 1), *(f"{curve[row]:g}" for curve in counts.values()))
    console.print(budget)
    console.print(f"{len(job.prompt.ids)} tokens, {len(reading.calls)} layers, mean density {reading.density:.3f}")
