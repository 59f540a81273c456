"""From the options of ``stem-attention eval`` to its measures. Each is made only when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from stem_attention.cli.errors import UserError
from stem_attention.cli.loading import open_model
from stem_attention.cli.options import check_counts, read_device, read_dtype, read_lengths, read_text
from stem_attention.evaluation.measure import Measure, Record
from stem_attention.evaluation.models import Model, ModelSource, Tokenizer, context_length
from stem_attention.evaluation.texts import Text, stdlib_text

LONGEST_DEFAULT = 8192
_WITH_TASKS = ("stress", "ruler", "longbench")
STRETCHED = "stress"
"""The measure that may go beyond the length that a model was trained for: whether that holds is one of its questions."""


@dataclass(frozen=True)
class EvalOptions:
    """Option values as they came."""

    measures: list[str]
    study: str | None
    policies: list[str]
    model: str | None
    lengths: str | None
    texts: list[Path]
    windows: int
    kinds: str
    depths: str
    samples: int
    count: int
    haystack: Path | None
    chat_template: bool
    tasks: str | None
    limit: int
    data: Path | None
    seed: int
    device: str
    dtype: str
    commit: str | None
    part: str
    out: Path


@dataclass(frozen=True)
class Setup:
    """What measures are made from."""

    options: EvalOptions
    source: ModelSource
    model: Model
    tokenizer: Tokenizer
    dtype: torch.dtype
    lengths: list[int]
    texts: list[Text]


Made = tuple[Measure, Record]
"""A measure, and the settings that its cases' keys do not say."""


def _perplexity(setup: Setup) -> Made:
    from stem_attention.evaluation.perplexity import Perplexity

    return Perplexity(setup.model, setup.tokenizer, setup.texts, setup.lengths, setup.options.windows), {}


def _layers(setup: Setup) -> Made:
    from stem_attention.evaluation.layers import Layers

    return Layers(setup.model, setup.tokenizer, setup.texts, setup.lengths, setup.options.windows), {}


def _cost(setup: Setup) -> Made:
    from stem_attention.evaluation.cost import Cost

    return Cost(setup.model, setup.tokenizer, setup.texts, setup.lengths, setup.options.windows), {}


def _needle(setup: Setup) -> Made:
    from stem_attention.evaluation.needle import Needle, Settings

    options = setup.options
    haystack = None if options.haystack is None else Text(options.haystack.name, read_text(options.haystack, "--haystack"))
    settings = Settings(options.seed, options.count, haystack, options.chat_template)
    kinds = [kind.strip() for kind in options.kinds.split(",") if kind.strip()]
    measure = Needle(setup.model, setup.tokenizer, kinds, setup.lengths, read_depths(options.depths), options.samples, settings)
    return measure, settings.to_dict()


def _stress(setup: Setup) -> Made:
    from stem_attention.evaluation.stress import Stress, read_vocabulary
    from stem_attention.evaluation.synthetic import TASKS

    vocabulary, options = read_vocabulary(Path(setup.source.location)), setup.options
    tasks = read_tasks(options) or list(TASKS)
    return Stress(setup.model, vocabulary, tasks, setup.lengths, options.limit, options.seed), {}


def _ruler(setup: Setup) -> Made:
    from stem_attention.evaluation.ruler import ruler

    options, tasks = setup.options, read_tasks(setup.options)
    measure = ruler(
        setup.model, setup.tokenizer, setup.lengths, options.limit, tasks=tasks, data=options.data, seed=options.seed
    )
    return measure, {"samples": options.limit, "seed": options.seed}


def _longbench(setup: Setup) -> Made:
    from stem_attention.evaluation.longbench import longbench

    options, tasks = setup.options, read_tasks(setup.options)
    measure = longbench(setup.model, setup.tokenizer, setup.lengths, options.limit, tasks=tasks, data=options.data)
    return measure, {"samples": options.limit}


def read_tasks(options: EvalOptions) -> list[str] | None:
    """The tasks named; None for no choice.

    Raises:
        UserError: It is not clear whose tasks they are.
    """
    named = [name.strip() for name in (options.tasks or "").split(",") if name.strip()]
    owners = [name for name in dict.fromkeys(options.measures) if name in _WITH_TASKS]
    if named and len(owners) > 1:
        raise UserError(
            f"--tasks: expected only one of {', '.join(_WITH_TASKS)} beside it, got {', '.join(owners)}; run them apart"
        )
    return named or None


MAKERS: dict[str, Callable[[Setup], Made]] = {
    "perplexity": _perplexity,
    "needle": _needle,
    "layers": _layers,
    "cost": _cost,
    "stress": _stress,
    "ruler": _ruler,
    "longbench": _longbench,
}


def read_measures(names: list[str]) -> None:
    """Check the names, before anything slow.

    Raises:
        UserError: There is none, or one is unknown.
    """
    unknown = [name for name in names if name not in MAKERS]
    if unknown or not names:
        got = ", ".join(unknown) or "nothing"
        raise UserError(f"MEASURE: expected some of {', '.join(MAKERS)}, got {got}; pick among these names")


def read_depths(text: str) -> list[float]:
    """Numbers with commas between.

    Raises:
        UserError: One is not a number.
    """
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UserError(f"--depths: expected numbers such as 0.1,0.5,0.9, got {text!r}; correct it") from error


def read_setup(options: EvalOptions, console: Console) -> Setup:
    """Check all that can be checked, then load the model.

    Raises:
        UserError: Some option is wrong; the message names it.
        UnsupportedError: The model's class cannot take Stem's attention function.
    """
    check_counts(windows=options.windows, samples=options.samples, count=options.count, limit=options.limit)
    read_tasks(options)
    device = read_device(options.device)
    dtype = read_dtype(options.dtype, device)
    lengths = None if options.lengths is None else sorted(set(read_lengths(options.lengths)))
    texts = [Text(file.name, read_text(file, "--text")) for file in options.texts] or [stdlib_text()]
    source, model, tokenizer = open_model(options.model, device, dtype, console)
    limit = context_length(model)
    if lengths is None:
        lengths = [min(limit or LONGEST_DEFAULT, LONGEST_DEFAULT)]
    elif limit is not None and lengths[-1] > limit and set(options.measures) - {STRETCHED}:
        raise UserError(f"--lengths: expected at most {limit}, the model's context, got {lengths[-1]}; lower it")
    return Setup(options, source, model, tokenizer, dtype, lengths, texts)


def make_measures(setup: Setup) -> tuple[list[Measure], dict[str, Record]]:
    """The measures asked for, and their settings by name.

    Raises:
        UserError: An option is wrong.
        ValueError: A text or prompt does not fit.
    """
    made = {name: MAKERS[name](setup) for name in dict.fromkeys(setup.options.measures)}
    return [measure for measure, _ in made.values()], {name: settings for name, (_, settings) in made.items()}
