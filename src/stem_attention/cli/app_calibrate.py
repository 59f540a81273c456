"""The subcommand ``calibrate`` and its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stem_attention.cli.annotations import Config, Device, Dtype, Model, Settings
from stem_attention.cli.errors import HOST, need
from stem_attention.evaluation.calibrate import NEEDLE_WEIGHT


def calibrate(
    out: Annotated[Path, typer.Option(help="JSON file to write: a StemConfig that every command and host reads.")],
    model: Model = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a prompt.", show_default="what the model's context holds, up to 32768")
    ] = None,
    density: Annotated[float, typer.Option(help="Kept share of the causal block pairs, of all heads together.")] = 0.16,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="UTF-8 file to learn from. Repeatable.", show_default="source code of Python's standard library"),
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows of each text.")] = 2,
    haystack: Annotated[Path | None, typer.Option(help="Text around hidden numbers.", show_default="made-up prose")] = None,
    needles: Annotated[int, typer.Option(help="Prompts that hide numbers.")] = 8,
    needle_weight: Annotated[
        float, typer.Option(help="How many tokens of a text a token of an answer is worth.")
    ] = NEEDLE_WEIGHT,
    config: Config = None,
    settings: Settings = None,
    seed: Annotated[int, typer.Option(help="Seed of the prompts and of the random signs.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> int:
    """Learn how much each head of a model may drop, from the model's own gradients, and write it as a config.

    Keep by mass can then lose less at the same density: what it does on other windows of the texts is said at the end, and exit
    code 3 means that they suffer. Weights stay as they are; the file is for this model alone.
    """
    need(*HOST, purpose="calibrate")
    from stem_attention.cli.calibrate import CalibrateOptions, calibrate_command

    options = CalibrateOptions(
        model, length, density, text or [], windows, haystack, needles, needle_weight, config, settings or [], seed, device,
        dtype, out,
    )  # fmt: skip
    return calibrate_command(options)
