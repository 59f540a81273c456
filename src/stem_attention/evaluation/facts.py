"""What is needed to repeat a run: code, machine, weights, texts, contenders."""

from __future__ import annotations

import datetime as dt
import hashlib
import platform
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import transformers

from stem_attention import __version__
from stem_attention.evaluation.contenders import Contender
from stem_attention.evaluation.measure import Record
from stem_attention.evaluation.models import Model, ModelSource
from stem_attention.evaluation.texts import Text

FORMAT = 1
"""Of run.json and records.jsonl; goes up when their meaning changes."""

_PACKAGE = Path(__file__).resolve().parents[1]
_CHUNK = 1 << 20


def session_facts(arguments: Sequence[str], commit: str | None) -> Record:
    """One invocation: may differ between the start of a run and its continuation.

    Args:
        arguments: The command line after the command's name.
        commit: What the user says, for machines without the repository; None to ask git.
    """
    return {
        "command": shlex.join(["stem-attention", *arguments]),
        "started": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "commit": git_commit() if commit is None else commit,
        "uncommitted": uncommitted(),
        "versions": {
            "stem-attention": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
    }


def model_facts(source: ModelSource, model: Model) -> Record:
    """Which weights: the file's or directory's name, their hash, or a hub's revision."""
    revision = getattr(model.config, "_commit_hash", None)
    return {"name": Path(str(source)).name, "sha256": weights_hash(source), "revision": revision}


def text_facts(texts: Iterable[Text]) -> Record:
    """Texts by name."""
    return {text.name: {"sha256": text.sha256, "characters": len(text.content)} for text in texts}


def contender_facts(contender: Contender, lengths: Iterable[int]) -> Record:
    """What a contender is, and what it runs at every length.

    Raises:
        ValueError: It cannot be made at a length.
    """
    return {"family": contender.family, "at": {str(tokens): contender.describe(tokens) for tokens in lengths}}


def header(
    *, model: Record, dtype: torch.dtype, device: str, texts: Record, contenders: Record, settings: Mapping[str, Record],
    session: Record,
) -> Record:  # fmt: skip
    """run.json: the parts of :mod:`stem_attention.evaluation.journal`, in the order in which a reader wants them.

    Args:
        model: Of :func:`model_facts`.
        dtype: Of the weights.
        device: The device's name.
        texts: Of :func:`text_facts`.
        contenders: Of :func:`contender_facts`.
        settings: By measure, what its cases' keys do not say.
        session: Of :func:`session_facts`.
    """
    return {
        "format": FORMAT,
        "model": model,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "texts": texts,
        "settings": dict(settings),
        "contenders": contenders,
        "sessions": [session],
    }


def git_commit() -> str | None:
    """The commit of the repository that tracks the package; None for an installed package or without git."""
    return _git("rev-parse", "HEAD") if _git("ls-files", "--error-unmatch", str(_PACKAGE / "__init__.py")) else None


def uncommitted() -> list[str]:
    """Source files that differ from the commit."""
    changed = _git("status", "--porcelain", "--", str(_PACKAGE)) if git_commit() else None
    return [line[3:] for line in changed.splitlines()] if changed else []


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(_PACKAGE), *arguments]
    try:
        finished = subprocess.run(command, check=False, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return finished.stdout.rstrip("\n") if finished.returncode == 0 else None


def weights_hash(source: ModelSource) -> str | None:
    """SHA-256 of the weight files, in the order of their names; None for a model named by its hub id."""
    files = [Path(str(source))] if source.gguf else sorted(Path(source.location).glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest() if files else None
