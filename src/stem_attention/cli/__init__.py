"""The command ``stem-attention``."""

import sys

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command with ``sys.argv`` or other arguments; returns the exit code that :func:`.errors.run_app` tells of.

    3 is a result that is not as good as it should be (:data:`.run.MISSED`).
    """
    from stem_attention.cli.app import app
    from stem_attention.cli.errors import run_app

    return run_app(app, "stem-attention", sys.argv[1:] if arguments is None else arguments)
