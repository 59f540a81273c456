"""A model by what a user calls it, with a status line while it loads."""

from __future__ import annotations

import torch
from rich.console import Console

from stem_attention.cli.errors import UserError
from stem_attention.evaluation.models import Model, ModelSource, Tokenizer, find_model, load_model, take_stem


def open_model(
    name: str | None, device: torch.device, dtype: torch.dtype, console: Console
) -> tuple[ModelSource, Model, Tokenizer]:
    """Find and load a model and put it on Stem's attention function.

    Raises:
        UserError: There is no such model, or it cannot be read.
        UnsupportedError: The model's class cannot take Stem's attention function.
    """
    try:
        source = find_model(name)
        with console.status(f"loading {source}"):
            model, tokenizer = load_model(source, device, dtype)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    try:
        take_stem(model)
    except ValueError as error:
        raise UserError(f"--model: {source} holds a bad stem_attention config: {error}") from error
    return source, model, tokenizer
