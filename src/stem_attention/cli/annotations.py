"""Options that several subcommands share, as typer reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stem_attention.policies import policy_names

Model = Annotated[
    str | None,
    typer.Option(help="Model directory, GGUF file or hub id.", show_default="the embedded SmolLM2-135M-Instruct"),
]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        help="Text to read; - is standard input, which is also read when something is piped in.",
        show_default="made-up prose with a planted number and a question about it",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the default prompt; fixed, so that runs repeat.")]
Context = Annotated[
    int | None,
    typer.Option(
        help="Tokens of the default prompt.", show_default="what the model's context holds beside the answer, up to 32768"
    ),
]
Depth = Annotated[float, typer.Option(help="Where the default prompt plants the number: 0 start of the text, 1 end.")]
ChatTemplate = Annotated[bool, typer.Option(help="Wrap the prompt in the model's chat template, if it has one.")]
PolicyName = Annotated[str, typer.Option("--policy", help=f"Which blocks to keep: {', '.join(policy_names())}.")]
Preset = Annotated[str, typer.Option(help="StemConfig to start from: default, paper, angelslim or mass.")]
Config = Annotated[Path | None, typer.Option(help="JSON file of StemConfig fields; they override the preset.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Any StemConfig field, or an option of --policy; overrides. Repeatable."),
]
Part = Annotated[
    str,
    typer.Option(
        metavar="I/N", help="Run every N-th case from the I-th on: N processes share a grid, each with an --out of its own."
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes the accelerator if there is one.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16; auto: float32 on the CPU, bfloat16 elsewhere.")]
Plot = Annotated[
    Path | None,
    typer.Option(help="Write a PNG: kept blocks, block scores, budget curve, how far heads look. Needs matplotlib."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Heads = Annotated[int | None, typer.Option(help="Query heads.", show_default="the model's")]
KvHeads = Annotated[int | None, typer.Option(help="Key/value heads.", show_default="the model's")]
HeadDim = Annotated[int | None, typer.Option(help="Dimension of a head.", show_default="the model's")]
