"""What the command says to a user who made a mistake: one line."""

from __future__ import annotations

import importlib.util

_EXTRAS = {
    "transformers": "transformers",
    "gguf": "transformers",
    "accelerate": "transformers",
    "matplotlib": "plot",
    "triton": "gpu",
}

HOST = ("transformers", "gguf", "accelerate")
"""Packages that every command with a model needs."""


class UserError(Exception):
    """Something the user can put right. Its text is one line that names the culprit and the way out."""


def missing(package: str) -> bool:
    """Whether an optional package is not installed. Does not import it."""
    return importlib.util.find_spec(package) is None


def install_command(package: str) -> str:
    """The command that installs an optional package."""
    return f"pip install 'stem-attention[{_EXTRAS[package]}]'"


def need(*packages: str, purpose: str) -> None:
    """Make sure that optional packages are installed.

    Raises:
        UserError: One is not; the message says how to install it.
    """
    absent = [package for package in packages if missing(package)]
    if absent:
        raise UserError(f"{purpose} needs {', '.join(absent)}, which is not installed; run: {install_command(absent[0])}")
