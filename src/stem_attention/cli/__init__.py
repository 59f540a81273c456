"""The command ``stem-attention``."""

from __future__ import annotations

import sys

from stem_attention.cli.app import run_app

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: What follows the command's name; ``sys.argv`` unless given.

    Returns:
        The exit code: 0 success, 1 an error the user can put right (one line on stderr says which), 2 a command line that
        does not parse, 3 an answer without the planted fact, 130 interrupted.
    """
    return run_app(sys.argv[1:] if arguments is None else arguments)
