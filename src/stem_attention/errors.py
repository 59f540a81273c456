"""The exceptions of the library, and the one shape its messages take."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TypeGuard

from torch import SymInt, Tensor


class UnsupportedError(RuntimeError):
    """The call is well formed, but the chosen backend, host or mode cannot carry it out."""


def bad_argument(name: str, expected: str, got: object, fix: str) -> ValueError:
    """Build (not raise) the ValueError for a bad argument: its name, what was expected, what came, the way out."""
    return ValueError(f"{name}: expected {expected}, got {got}; {fix}")


def nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """Ask whether the known name that looks most like a wrong one was meant; ``otherwise`` where none does."""
    lowered = {each.lower(): each for each in known}  # a slip in case is the least of all
    near = get_close_matches(name.lower(), lowered, 1)
    return f"did you mean {lowered[near[0]]}?" if near else otherwise


def describe(value: object) -> str:
    """Say what came instead of a good tensor: its dtype and shape, or its type."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def is_int(value: object) -> TypeGuard[int]:
    """Tell integers from all else, ``True`` and ``False`` too."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_size(value: object) -> TypeGuard[int]:
    """Tell integers and those that ``torch.export`` knows by symbol from all else."""
    return is_int(value) or isinstance(value, SymInt)
