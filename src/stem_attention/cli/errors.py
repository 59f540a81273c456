"""Run a typer app so that every mistake of the user ends as one line on stderr."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import typer

from stem_attention.errors import UnsupportedError

_EXTRAS = {**dict.fromkeys(("transformers", "gguf", "accelerate"), "transformers"), "matplotlib": "plot", "triton": "gpu"}

# typer carries its own copy of click or depends on it, according to its version; both ways this is what a command line
# that does not parse raises.
_USAGE_ERROR: Any = typer.BadParameter.__mro__[1]


class UserError(Exception):
    """Something the user can put right. Its text is one line that names the culprit and the way out."""


def missing(package: str) -> bool:
    """Tell whether an optional package is not installed, without importing it."""
    return importlib.util.find_spec(package) is None


def install_command(package: str) -> str:
    """Build the command that installs an optional package."""
    return f"pip install 'stem-attention[{_EXTRAS[package]}]'"


def need(*packages: str, purpose: str) -> None:
    """Raise a UserError that says how to install optional packages, unless all are."""
    absent = [package for package in packages if missing(package)]
    if absent:
        raise UserError(f"{purpose} needs {', '.join(absent)}, which is not installed; run: {install_command(absent[0])}")


@contextmanager
def blaming(otherwise: str, **options: str) -> Iterator[None]:
    """Turn a ValueError into a UserError that begins with the option of the argument it names, or else with ``otherwise``."""
    try:
        yield
    except ValueError as error:
        argument, _, rest = str(error).partition(":")
        raise UserError(f"{options[argument]}:{rest}" if argument in options else f"{otherwise}{error}") from error


def run_app(app: typer.Typer, name: str, arguments: list[str]) -> int:
    """Run a command line, of the program ``name``; mistakes of the user end as one line on stderr.

    Returns the exit code: 0 success, 1 an error that the user can put right, 2 a command line that does not parse, 130
    interrupted, or what a command returned. No arguments ask for help.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # not a text stream of Python's own, or closed
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal in cp1252 shows ? and goes on
    try:
        code = int(app(arguments or ["--help"], prog_name=name, standalone_mode=False, obj=arguments) or 0)
        if code != 130:  # which newer typer makes of Ctrl-C by itself
            return code
        message = "interrupted"
    except _USAGE_ERROR as error:
        typed = getattr(getattr(error, "param", None), "opts", None)
        named = f"{typed[0]}: {error.message}" if typed and error.message else error.format_message()
        asked = getattr(getattr(error, "ctx", None), "command_path", name)
        code, message = 2, f"{named.removesuffix('.')}; see `{asked} --help`"
    except (UserError, UnsupportedError) as error:
        code, message = 1, str(error)
    except torch.OutOfMemoryError as error:
        code, message = 1, f"out of memory: {error}; read a shorter prompt or use a smaller dtype"
    except OSError as error:  # a disk that filled up, a folder that went away
        code, message = 1, f"{error}; look after the disk and the paths"
    except (KeyboardInterrupt, typer.Abort):
        code, message = 130, "interrupted"
    print(f"{name}:", " ".join(message.split()), file=sys.stderr)
    return code
