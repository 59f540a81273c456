"""The subcommands and their options."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

import stem_attention
from stem_attention.cli.annotations import (
    ChatTemplate,
    Config,
    Context,
    Depth,
    Device,
    Dtype,
    HeadDim,
    Heads,
    Json,
    KvHeads,
    Model,
    Plot,
    PolicyName,
    Preset,
    PromptFile,
    Seed,
    Settings,
)  # fmt: skip
from stem_attention.cli.app_calibrate import calibrate
from stem_attention.cli.app_compile import precompile
from stem_attention.cli.app_eval import evaluate, report
from stem_attention.cli.errors import HOST, UserError, need
from stem_attention.errors import UnsupportedError

# typer carries its own copy of click or depends on it, according to its version; both ways this is what a command line
# that does not parse raises.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="stem-attention", add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
)


@app.command()
def run(
    model: Model = None,
    prompt_file: PromptFile = None,
    seed: Seed = 0,
    context: Context = None,
    depth: Depth = 0.5,
    chat_template: ChatTemplate = True,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 32,
    policy: PolicyName = "stem",
    preset: Preset = "default",
    config: Config = None,
    settings: Settings = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Density and time of every layer.")] = False,
    plot: Plot = None,
    layer: Annotated[int | None, typer.Option(help="Layer of the picture.", show_default="the middle one")] = None,
    head: Annotated[int, typer.Option(help="Query head of the picture.")] = 0,
    as_json: Json = False,
) -> int:
    """Read a long prompt with a real model, dense and with Stem, and compare answers, times and agreement.

    Exit code 3 means that the run went well but Stem's answer lacks the number planted in the default prompt.
    """
    need(*HOST, purpose="run")
    from stem_attention.cli.job import JobOptions
    from stem_attention.cli.run import run_command

    options = JobOptions(
        model, prompt_file, seed, context, depth, chat_template, max_new_tokens, policy, preset, config, settings or [],
        device, dtype, plot, [] if layer is None else [layer], [head],
    )  # fmt: skip
    return run_command(options, verbose=verbose, as_json=as_json)


@app.command()
def inspect(
    model: Model = None,
    prompt_file: PromptFile = None,
    seed: Seed = 0,
    context: Context = None,
    depth: Depth = 0.5,
    chat_template: ChatTemplate = True,
    policy: PolicyName = "stem",
    preset: Preset = "default",
    config: Config = None,
    settings: Settings = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    layer: Annotated[
        list[int] | None, typer.Option(help="Layer to show. Repeatable.", show_default="first, middle and last")
    ] = None,
    head: Annotated[list[int] | None, typer.Option(help="Query head to show. Repeatable.", show_default="0")] = None,
    plot: Plot = None,
    panels: Annotated[
        Path | None,
        typer.Option(help="Write the picture's panels into this directory, a PNG each. Needs matplotlib."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Show which blocks chosen layers and heads keep, as a picture and in numbers, without generating."""
    need(*HOST, purpose="inspect")
    from stem_attention.cli.inspect import inspect_command
    from stem_attention.cli.job import JobOptions

    options = JobOptions(
        model, prompt_file, seed, context, depth, chat_template, 0, policy, preset, config, settings or [],
        device, dtype, plot, layer or [], head or [0],
    )  # fmt: skip
    return inspect_command(options, panels=panels, as_json=as_json)


@app.command()
def bench(
    suite: Annotated[
        str,
        typer.Option(
            help="attention: the whole call; kernel: attention over given lists; selection: choosing the blocks; "
            "serving: chunks of many prompts from a paged cache; ttft: whole models (llama-3.1-8b, qwen3-8b, qwen2.5-7b, "
            "llama-3.2-1b, tiny) until the first token."
        ),
    ] = "attention",
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens, with commas between.")] = "8192,32768",
    model: Annotated[
        str | None,
        typer.Option(
            help="Take the heads of a model: llama-3.1-8b, qwen3-8b, qwen2.5-7b, llama-3.2-1b, gemma.",
            show_default="8 query heads, 2 key/value heads, head_dim 64; for ttft llama-3.2-1b",
        ),
    ] = None,
    heads: Heads = None,
    kv_heads: KvHeads = None,
    head_dim: HeadDim = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    repeats: Annotated[
        int | None,
        typer.Option(help="Timed runs of each, in turn; medians are printed.", show_default="5 on the CPU, 20 elsewhere"),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="torch's choice")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random inputs.")] = 0,
    dense: Annotated[bool, typer.Option("--dense/--no-dense", help="Time dense attention too, up to 262144 tokens.")] = True,
    preset: Preset = "default",
    config: Config = None,
    settings: Settings = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG: time against length. Needs matplotlib.")] = None,
    first_call: Annotated[
        bool, typer.Option("--first-call", help="ttft: also time new processes' first prefill, Triton cache empty and filled.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Time Stem against its peers on random inputs, after checking its result.

    Peers are dense attention (SDPA; on a GPU cuDNN's, Flash and FlashAttention-4), for the kernel FlexAttention over the same
    lists, for the selection the same choice in eager torch.
    """
    from stem_attention.cli.bench import BenchOptions, bench_command

    options = BenchOptions(
        suite, lengths, model, heads, kv_heads, head_dim, device, dtype, repeats, threads, seed, dense, preset, config,
        settings or [], plot, first_call,
    )  # fmt: skip
    return bench_command(options, as_json=as_json)


app.command()(calibrate)
app.command("compile")(precompile)


app.command("eval")(evaluate)
app.command()(report)


@app.command()
def doctor(as_json: Json = False) -> int:
    """Say what is installed, which devices there are, which backend would run what and why, and what is missing."""
    from stem_attention.cli.doctor import doctor_command

    return doctor_command(as_json=as_json)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(stem_attention.__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Training-free sparse attention for long prompts (Stem, arXiv 2603.06274)."""


def run_app(arguments: list[str]) -> int:
    """Run the command line ``arguments``; returns the exit code. Mistakes of the user end as one line on stderr."""
    try:
        code = app(arguments, prog_name="stem-attention", standalone_mode=False, obj=arguments)
    except _USAGE_ERROR as error:
        return _complain(f"{error.format_message()}; see `stem-attention --help`", 2)  # type: ignore[attr-defined]
    except (UserError, UnsupportedError) as error:
        return _complain(str(error), 1)
    except torch.OutOfMemoryError as error:
        return _complain(f"out of memory: {error}; read a shorter prompt or use a smaller dtype", 1)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("interrupted", 130)
    # Newer typer turns Ctrl-C into this exit code by itself.
    return _complain("interrupted", 130) if code == 130 else int(code or 0)


def _complain(message: str, code: int) -> int:
    print("stem-attention:", " ".join(message.split()), file=sys.stderr)
    return code
