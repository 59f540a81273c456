"""Describe what is needed to repeat a run: code, machine, weights, texts, contenders."""

from __future__ import annotations

import datetime as dt
import hashlib
import platform
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

import stem_attention
from stem_attention.models.load import ModelSource
from stem_attention.models.texts import Text
from stem_evals.measure import Record
from stem_evals.runner import Plan

FORMAT = 1
"""Of run.json and records.jsonl; goes up when their meaning changes."""

_PACKAGE = Path(stem_attention.__file__).resolve().parent


def header(
    plan: Plan, source: ModelSource, model: PreTrainedModel, device: str, texts: Iterable[Text], command: Sequence[str],
    commit: str | None,
) -> Record:  # fmt: skip
    """run.json: the parts of :mod:`stem_evals.journal`, in the order in which a reader wants them.

    Args:
        plan: Whose measures' settings are told, and whose contenders are described at every length.
        source: Where the model's files are.
        model: The model.
        device: The device's name.
        texts: What is read.
        command: The command line after the command's name.
        commit: What the user says, for machines without the repository; None to ask git.
    """
    text = model.config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    backend = stem_attention.explain(device=model.device, dtype=model.dtype, head_dim=head_dim)
    session = {
        "command": shlex.join(["stem-evals", *command]),
        "started": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "commit": git_commit() if commit is None else commit,
        "versions": {
            "stem-attention": stem_attention.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
        "backend": backend.chosen,
        "dense_below": backend.dense_below,
    }
    revision = getattr(model.config, "_commit_hash", None)
    return {
        "format": FORMAT,
        "model": {"name": Path(str(source)).name, "sha256": weights_hash(source), "revision": revision},
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device,
        "texts": {text.name: {"sha256": text.sha256, "characters": len(text.content)} for text in texts},
        "settings": {measure.name: measure.settings for measure in plan.measures},
        "contenders": {
            one.name: {
                "family": one.family,
                "at": {str(tokens): one.describe(tokens) for tokens, able in plan.reachable.items() if one in able},
            }
            for able in plan.reachable.values()
            for one in able
        },
        "sessions": [session],
    }


def git_commit() -> str | None:
    """The commit of the repository that tracks the library, "-dirty" behind it if files differ; None without one or git."""
    run = partial(subprocess.run, cwd=_PACKAGE, check=True, capture_output=True, text=True)
    with suppress(FileNotFoundError, subprocess.CalledProcessError):
        run(["git", "ls-files", "--error-unmatch", "__init__.py"])
        return run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]).stdout.strip()
    return None


def weights_hash(source: ModelSource) -> str | None:
    """SHA-256 of the weight files, in the order of their names; None for a model named by its hub id."""
    files = [Path(str(source))] if source.gguf else sorted(Path(source.location).glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest() if files else None
