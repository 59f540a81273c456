"""The command ``stem-attention``: its subcommands, in groups."""

from typing import Annotated

import typer

import stem_attention
from stem_attention.cli.calibrate import calibrate
from stem_attention.cli.compile import precompile
from stem_attention.cli.doctor import doctor
from stem_attention.cli.inspect import inspect
from stem_attention.cli.run import run

_TRY, _TUNE, _SET_UP = "Try it on a model", "Fit it to a model", "Set it up"

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
app.command(rich_help_panel=_TRY)(run)
app.command(rich_help_panel=_TRY)(inspect)
app.command(rich_help_panel=_TUNE)(calibrate)
app.command("compile", rich_help_panel=_SET_UP)(precompile)
app.command(rich_help_panel=_SET_UP)(doctor)


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
