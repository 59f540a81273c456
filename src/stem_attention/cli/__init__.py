"""The command ``stem-attention``."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command with ``sys.argv`` or other arguments.

    Returns the exit code: 0 success, 1 an error the user can put right (one line on stderr says which), 2 a command line that
    does not parse, 3 a result that is not as good as it should be (:data:`.run.MISSED`, :data:`.calibrate.LOSES`), 130
    interrupted.
    """
    from stem_attention.cli.app import app
    from stem_attention.cli.errors import run_app

    return run_app(app, "stem-attention", sys.argv[1:] if arguments is None else arguments)
