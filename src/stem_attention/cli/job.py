"""What run and inspect have in common: options checked, model loaded, prompt made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from stem_attention.cli.errors import UserError
from stem_attention.cli.loading import open_model
from stem_attention.cli.options import (
    Choice,
    check_counts,
    check_plot,
    read_choice,
    read_device,
    read_dtype,
    read_prompt,
)
from stem_attention.evaluation.models import Model, ModelSource, Tokenizer, context_length
from stem_attention.evaluation.prefill import Reading, read
from stem_attention.evaluation.prompts import Prompt, chat_ids, planted_prompt
from stem_attention.evaluation.views import HeadRecorder

LONGEST_DEFAULT_PROMPT = 32768
FALLBACK_CONTEXT = 8192
MARGIN = 64
"""Tokens of the model's context that the default prompt leaves free beside the answer."""


@dataclass(frozen=True)
class JobOptions:
    """Option values as they came."""

    model: str | None
    prompt_file: Path | None
    seed: int
    context: int | None
    depth: float
    chat_template: bool
    max_new_tokens: int
    policy: str
    preset: str
    config: Path | None
    settings: list[str]
    device: str
    dtype: str
    plot: Path | None
    layers: list[int]
    heads: list[int]


@dataclass(frozen=True)
class Job:
    """A model and a prompt, ready to be read."""

    source: ModelSource
    model: Model
    tokenizer: Tokenizer
    prompt: Prompt
    choice: Choice
    dtype: torch.dtype
    layers: list[int]
    """Layers to show; empty when the user named none."""
    heads: list[int]

    @property
    def layer_count(self) -> int:
        """Layers of the model."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    def describe(self) -> dict[str, Any]:
        """The facts about the job that belong in every report."""
        return {
            "model": str(self.source),
            "prompt_tokens": len(self.prompt.ids),
            "device": str(self.model.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "policy": self.choice.name,
            "config": self.choice.config.to_dict(),
        }


def prepare(options: JobOptions, progress: Console) -> Job:
    """Check all that can be checked, then load the model and make the prompt.

    Raises:
        UserError: Some option is wrong; the message names it.
        UnsupportedError: The model's class cannot take Stem's attention function.
    """
    choice = read_choice(options.policy, options.preset, options.config, options.settings)
    device = read_device(options.device)
    dtype = read_dtype(options.dtype, device)
    check_plot(options.plot)
    if not 0 <= options.depth <= 1:
        raise UserError(f"--depth: expected a number from 0 to 1, got {options.depth}; 0 is the start of the text")
    if options.context is not None:
        check_counts(context=options.context)
    text = read_prompt(options.prompt_file)
    source, model, tokenizer = open_model(options.model, device, dtype, progress)
    _check_indices(model, options)
    prompt = _prompt(model, tokenizer, text, options)
    return Job(source, model, tokenizer, prompt, choice, dtype, options.layers, options.heads)


def _check_indices(model: Model, options: JobOptions) -> None:
    config = model.config.get_text_config()
    count = config.num_hidden_layers
    for name, indices, limit in (("layer", options.layers, count), ("head", options.heads, config.num_attention_heads)):
        for index in indices:
            if not 0 <= index < limit:
                raise UserError(f"--{name}: expected 0 to {limit - 1} for this model, got {index}; pick one of those")


def _prompt(model: Model, tokenizer: Tokenizer, text: str | None, options: JobOptions) -> Prompt:
    limit = context_length(model)
    room = (FALLBACK_CONTEXT if limit is None else limit) - options.max_new_tokens
    if text is not None:
        prompt = Prompt(chat_ids(tokenizer, text, use_template=options.chat_template))
        if not prompt.ids:
            raise UserError("--prompt-file: the tokenizer makes no tokens of this text; write some words into it")
    else:
        length = min(room - MARGIN, LONGEST_DEFAULT_PROMPT) if options.context is None else options.context
        if limit is not None and length > room:
            raise UserError(_too_long(length, limit, options.max_new_tokens, "lower --context"))
        try:
            prompt = planted_prompt(
                tokenizer, length, seed=options.seed, depth=options.depth, use_template=options.chat_template
            )
        except ValueError as error:
            raise UserError(f"--context: {error}") from error
    if limit is not None and len(prompt.ids) > room:
        raise UserError(_too_long(len(prompt.ids), limit, options.max_new_tokens, "shorten the prompt"))
    return prompt


def _too_long(tokens: int, limit: int, answer: int, fix: str) -> str:
    beside = f" with {answer} more for the answer" if answer else ""
    return f"prompt of {tokens} tokens{beside} is longer than the model's context of {limit} tokens; {fix}"


def read_with_progress(
    job: Job, console: Console, dense: bool, max_new_tokens: int = 0, recorder: HeadRecorder | None = None
) -> Reading:
    """Prefill and answer with progress bars on ``console``."""
    name = "dense" if dense else job.choice.name
    columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[unit]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        layers = progress.add_task(f"{name}: prefill", total=job.layer_count, unit="layers")
        tokens = progress.add_task(f"{name}: answer", total=max_new_tokens, unit="tokens", visible=max_new_tokens > 0)

        def on_attention(call: Any) -> None:
            if recorder is not None:
                recorder(call)
            progress.advance(layers)

        reading = read(
            job.model, job.prompt.ids, None if dense else job.choice.to_run,
            max_new_tokens=max_new_tokens, on_attention=on_attention, on_token=lambda: progress.advance(tokens),
        )  # fmt: skip
        progress.update(tokens, total=len(reading.tokens))  # an answer may end before the limit
    return reading
