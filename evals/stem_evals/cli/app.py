"""The command ``stem-evals``."""

from __future__ import annotations

import sys

import typer

from stem_attention.cli.errors import run_app


def main(arguments: list[str] | None = None) -> int:
    """Run the command with ``sys.argv`` or other arguments; returns :func:`stem_attention.cli.errors.run_app`'s exit code."""
    from stem_evals.cli.bench import bench
    from stem_evals.cli.eval_app import evaluate, report

    app = typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown",
        context_settings={"help_option_names": ["-h", "--help"]},
    )  # fmt: skip
    app.callback()(_about)
    app.command(rich_help_panel="Speed")(bench)
    app.command("eval", rich_help_panel="Accuracy")(evaluate)
    app.command(rich_help_panel="Accuracy")(report)
    return run_app(app, "stem-evals", sys.argv[1:] if arguments is None else arguments)


def _about() -> None:
    """Speed and accuracy of stem-attention: what sparse attention gains, and what a model loses."""
