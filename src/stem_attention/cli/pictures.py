"""Selections as a PNG and as text."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from stem_attention.cli.errors import UserError
from stem_attention.cli.job import Job
from stem_attention.evaluation.prefill import Reading
from stem_attention.evaluation.views import BlockView, HeadRecorder, reach, row_counts, selections_by_layer
from stem_attention.policies import Stem
from stem_attention.policies.budget import block_count, row_budgets

_WIDEST_TEXT = 96


def views_or_error(reading: Reading, recorder: HeadRecorder) -> list[BlockView]:
    """The recorded views.

    Raises:
        UserError: None of the chosen layers ran sparse; the message says why.
    """
    views = recorder.views(reading)
    if not views:
        reasons = ", ".join(sorted({call.reason for call in reading.calls if not call.sparse}))
        raise UserError(
            f"nothing to show: the chosen layers ran dense ({reasons}); read a longer prompt, pass --set dense_below=0, "
            "or choose other layers"
        )
    return views


def save_picture(job: Job, reading: Reading, recorder: HeadRecorder, *, file: Path | None, panels: Path | None = None) -> None:
    """Draw the recorded layers and heads, in one file, as a directory of panels, or both.

    Raises:
        UserError: None of them ran sparse.
    """
    views = views_or_error(reading, recorder)
    from stem_attention.evaluation.plots import Picture, plot_panels, plot_picture

    selections, config, length = selections_by_layer(reading), job.choice.config, len(job.prompt.ids)
    curves = {f"kept in layer {view.layer}": row_counts(selections[view.layer]) for view in views}
    if job.choice.name == Stem.name:
        curves["budget (TPD)"] = [float(count) for count in row_budgets(config, block_count(length, config.block_size))]
    title = f"{job.choice.name} on {Path(str(job.source)).name}, {length} tokens"
    picture = Picture(title, views, curves, reach(reading))
    if file is not None:
        plot_picture(picture, file)
    if panels is not None:
        plot_panels(picture, panels)


def text_picture(kept: Tensor) -> str:
    """A block mask in characters, two rows of blocks a line; large masks are shrunk, showing any kept block."""
    rows = len(kept)
    if rows > _WIDEST_TEXT:
        shrunk = torch.nn.functional.adaptive_max_pool2d(kept[None, None].float(), _WIDEST_TEXT)
        kept, rows = shrunk[0, 0].bool(), _WIDEST_TEXT
    if rows % 2:
        kept = torch.cat([kept, torch.zeros_like(kept[:1])])
    halves = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}
    pairs = zip(kept[::2].tolist(), kept[1::2].tolist(), strict=True)
    return "\n".join("".join(halves[pair] for pair in zip(upper, lower, strict=True)) for upper, lower in pairs)
