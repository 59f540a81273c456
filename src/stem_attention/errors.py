"""The exceptions of the library, and the one shape its messages take."""

from __future__ import annotations


class UnsupportedError(RuntimeError):
    """The call is well formed, but the chosen backend, host or mode cannot carry it out."""


def bad_argument(name: str, expected: str, got: object, fix: str) -> ValueError:
    """Build (not raise) the ValueError for a bad argument: its name, what was expected, what came, the way out."""
    return ValueError(f"{name}: expected {expected}, got {got}; {fix}")
