"""The subcommands ``eval`` and ``report`` and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stem_attention.cli.annotations import ChatTemplate, Device, Dtype, Model, Part
from stem_attention.cli.errors import HOST, need
from stem_attention.evaluation.studies import STUDIES


def evaluate(
    context: typer.Context,
    measures: Annotated[
        list[str], typer.Argument(metavar="MEASURE...", help="perplexity, needle, layers, cost, stress, ruler, longbench.")
    ],
    out: Annotated[Path, typer.Option(help="Directory for records and report; the same command again goes on there.")],
    model: Model = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:FIELD=VALUE,...][@DENSITY]",
            help="Contender beside dense, as stem:beta=0, sink-window@0.18 or uniform@stem. Repeatable.",
            show_default="stem and paper",
        ),
    ] = None,
    study: Annotated[str | None, typer.Option(help=f"A set of contenders: {', '.join(STUDIES)}.")] = None,
    lengths: Annotated[
        str | None,
        typer.Option(help="Prompt lengths in tokens, with commas between.", show_default="the model's context, up to 8192"),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="UTF-8 file to predict. Repeatable.", show_default="source code of Python's standard library"),
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows of each text and length.")] = 4,
    kinds: Annotated[
        str, typer.Option(help="Needles: single, multikey, multivalue, multiquery, with commas between.")
    ] = "single,multikey,multivalue,multiquery",
    depths: Annotated[str, typer.Option(help="Where needles stand: 0 start of the text, 1 end.")] = "0,0.25,0.5,0.75,1",
    samples: Annotated[int, typer.Option(help="Prompts of each kind, length and depth.")] = 2,
    count: Annotated[int, typer.Option(help="Numbers in a prompt of every kind but single.")] = 4,
    haystack: Annotated[Path | None, typer.Option(help="Text around the needles.", show_default="made-up prose")] = None,
    chat_template: ChatTemplate = True,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of stress, ruler or longbench, with commas between.", show_default="all that can run"),
    ] = None,
    limit: Annotated[int, typer.Option(help="Prompts of each task of stress, ruler and longbench.")] = 50,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with the data of ruler's or longbench's tasks.", show_default="what lm-eval fetches"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of made-up prompts.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    commit: Annotated[
        str | None, typer.Option(help="Commit to put on record where there is no repository.", show_default="what git says")
    ] = None,
    part: Part = "1/1",
) -> int:
    """Measure a model dense and under any policies, and write a report with intervals and plots.

    Records are kept as they come: an interrupted command goes on where it stopped when it is given again.
    """
    need(*HOST, "matplotlib", purpose="eval")
    from stem_attention.cli.eval import eval_command
    from stem_attention.cli.eval_measures import EvalOptions

    options = EvalOptions(
        measures, study, policy or [], model, lengths, text or [], windows, kinds, depths, samples, count, haystack,
        chat_template, tasks, limit, data, seed, device, dtype, commit, part, out,
    )  # fmt: skip
    return eval_command(options, context.obj)


def report(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Directories that eval made.")],
    out: Annotated[
        Path | None, typer.Option(help="Directory for the report.", show_default="DIR itself, if there is one only")
    ] = None,
) -> int:
    """Join the records of several eval runs into one report."""
    need(*HOST, "matplotlib", purpose="report")
    from stem_attention.cli.eval import report_command

    return report_command(directories, out)
