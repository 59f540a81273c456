"""From option values to objects. Every mistake becomes a UserError before anything slow has started."""

from __future__ import annotations

import json
import os
import select
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from stem_attention.cli.errors import UserError, need
from stem_attention.config import StemConfig
from stem_attention.evaluation.bench_shapes import MODELS, Heads
from stem_attention.evaluation.contenders import read_value
from stem_attention.policies import Mass, Policy, Stem, make_policy

PRESETS: dict[str, Callable[[], StemConfig]] = {
    "default": StemConfig,
    "paper": StemConfig.paper,
    "angelslim": StemConfig.angelslim,
    "mass": StemConfig.mass,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Choice:
    """The policy to compare with dense attention.

    Attributes:
        name: Its name.
        config: Stem's config; other policies share fields such as ``block_size`` with it.
        policy: The policy itself.
    """

    name: str
    config: StemConfig
    policy: Policy

    @property
    def to_run(self) -> StemConfig | Policy:
        """What the transformers integration is configured with."""
        return self.config if isinstance(self.policy, (Stem, Mass)) else self.policy


def read_choice(name: str, preset: str, file: Path | None, settings: list[str]) -> Choice:
    """Build the policy: the preset, overridden by the file, overridden by ``FIELD=VALUE`` settings.

    Raises:
        UserError: Unknown names, an unreadable file, or bad values.
    """
    changes = {} if file is None else _read_json(file)
    known = {field.name for field in fields(StemConfig) if field.init}
    options: dict[str, Any] = {}
    for setting in settings:
        field, equals, value = setting.partition("=")
        if not equals or not field:
            raise UserError(f"--set: expected FIELD=VALUE, got {setting!r}; for example --set beta=0.1")
        target = changes if field in known or name == Stem.name else options
        target[field.strip()] = read_value(value.strip())
    try:
        config = StemConfig.from_dict({**_preset(preset).to_dict(), **changes})
        return Choice(name, config, make_policy(name, config, **options))
    except ValueError as error:
        raise UserError(str(error)) from error


def _preset(name: str) -> StemConfig:
    if name not in PRESETS:
        raise UserError(f"--preset: expected one of {', '.join(PRESETS)}, got {name!r}; pick one of these names")
    return PRESETS[name]()


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(file, "--config"))
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, or a number of too many digits
        raise UserError(f"--config: {file} is not JSON ({error}); write one object of StemConfig fields") from error
    if not isinstance(content, dict):
        raise UserError(f"--config: {file} holds a {type(content).__name__}; write one JSON object of StemConfig fields")
    return content


def read_text(file: Path, option: str) -> str:
    """The text of a file that an option names.

    Raises:
        UserError: It is not there, is no file, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{option}: {file} is not UTF-8 text; convert it first") from error
    except OSError as error:
        raise UserError(f"{option}: cannot read {file}: {error.strerror}; check the path") from error


def read_prompt(file: Path | None) -> str | None:
    """The user's prompt: the file's text, standard input for ``-`` or when text is piped in, else None.

    Raises:
        UserError: It cannot be read or is empty.
    """
    if file is None and not _is_piped():
        return None
    text = sys.stdin.read() if file is None or str(file) == "-" else read_text(file, "--prompt-file")
    if text.strip():
        return text
    if file is None:  # an empty pipe, as job runners attach, is no prompt
        return None
    raise UserError(f"--prompt-file: {file} is empty; write the text to read into it")


def _is_piped() -> bool:
    """Whether a pipe or file is attached to standard input and has something to say, without waiting for it."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
        return (stat.S_ISFIFO(mode) or stat.S_ISREG(mode)) and bool(select.select([sys.stdin], [], [], 0)[0])
    except (OSError, ValueError):  # no real standard input, or (on Windows) none that can be polled
        return False


def read_device(name: str) -> torch.device:
    """A device that is there; ``auto`` is the accelerator if there is one.

    Raises:
        UserError: No such device.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(
            f"--device: expected cpu, cuda, cuda:1, ..., got {name!r}; `stem-attention doctor` lists them"
        ) from error
    if device.type == "cpu" and (device.index or 0) == 0:
        return torch.device("cpu")
    count = torch.accelerator.device_count() if accelerator is not None and accelerator.type == device.type else 0
    if (device.index or 0) >= count:
        raise UserError(f"--device: {name} is not there ({count} {device.type} devices); `stem-attention doctor` lists them")
    return device


def read_dtype(name: str, device: torch.device) -> torch.dtype:
    """A floating-point dtype; ``auto`` is float32 on the CPU and bfloat16 elsewhere.

    Raises:
        UserError: Not a dtype that Stem takes.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise UserError(f"--dtype: expected auto, {', '.join(DTYPES)}, got {name!r}; pick one of these names")
    return DTYPES[name]


def read_heads(usual: Heads, model: str | None, heads: int | None, kv_heads: int | None, head_dim: int | None) -> Heads:
    """The heads of a model, or the usual ones, with what is given in their place.

    Raises:
        UserError: An unknown model, or numbers that do not go together.
    """
    if model is not None and model not in MODELS:
        raise UserError(
            f"--model: expected one of {', '.join(MODELS)}, got {model!r}; for others give --heads, --kv-heads and --head-dim"
        )
    given = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    check_counts(**{name: value for name, value in given.items() if value is not None})
    found = replace(
        usual if model is None else MODELS[model], **{name: value for name, value in given.items() if value is not None}
    )
    if found.heads % found.kv_heads:
        raise UserError(f"--kv-heads: expected a divisor of --heads {found.heads}, got {found.kv_heads}; change one of them")
    return found


def check_plot(file: Path | None) -> None:
    """Make sure that a picture can be drawn and written, before the long run.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    if file is None:
        return
    need("matplotlib", purpose="--plot")
    if file.suffix.lower() != ".png":
        raise UserError(f"--plot: expected a file that ends in .png, got {file}; the picture is a PNG")
    check_writable(file, "--plot")


def check_writable(file: Path, option: str) -> None:
    """Make sure that a file can be written, and leave no trace of that.

    Raises:
        UserError: It cannot.
    """
    existed = file.exists()
    try:
        file.open("ab").close()
    except OSError as error:
        raise UserError(f"{option}: cannot write {file}: {error.strerror}; check the path") from error
    if not existed:
        file.unlink()


def check_panels(directory: Path) -> None:
    """Make sure that pictures can be drawn and written into a directory, which is made if it is not there.

    Raises:
        UserError: matplotlib is missing, or the directory cannot be made.
    """
    need("matplotlib", purpose="--panels")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--panels: cannot make {directory}: {error.strerror}; name a directory") from error


def read_lengths(text: str) -> list[int]:
    """Numbers of tokens with commas between.

    Raises:
        UserError: One is not a number, or below 1.
    """
    lengths = []
    for part in text.split(","):
        if not part.strip().isdecimal() or int(part) < 1:
            raise UserError(f"--lengths: expected numbers of tokens such as 8192,32768, got {part.strip()!r}; correct it")
        lengths.append(int(part))
    return lengths


def check_counts(**counts: int) -> None:
    """Check that options which count something are at least 1.

    Raises:
        UserError: One is not.
    """
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected an integer >= 1, got {value}; pass 1 or more")
