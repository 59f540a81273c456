"""``stem-attention calibrate``: shares for every head of a model, written as a config."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from stem_attention.cli.errors import UserError
from stem_attention.cli.loading import open_model
from stem_attention.cli.options import check_counts, check_writable, read_choice, read_device, read_dtype, read_text
from stem_attention.cli.system import progress_console
from stem_attention.config import StemConfig
from stem_attention.evaluation.calibrate import (
    Lesson,
    allocate,
    check_density,
    learn,
    needle_lessons,
    other_windows,
    text_lessons,
    text_losses,
    tuned,
)
from stem_attention.evaluation.models import Model, Tokenizer, context_length
from stem_attention.evaluation.texts import Text, stdlib_text

LOSES = 3
"""Exit code where the file loses more of other windows than one share for all heads does, and more than a little."""

_BEARABLE = 0.01  # nats a token, about 1 % of perplexity
_LONGEST_DEFAULT = 32768


@dataclass(frozen=True)
class CalibrateOptions:
    """Option values as they came."""

    model: str | None
    length: int | None
    density: float
    texts: list[Path]
    windows: int
    haystack: Path | None
    needles: int
    needle_weight: float
    config: Path | None
    settings: list[str]
    seed: int
    device: str
    dtype: str
    out: Path


def calibrate_command(options: CalibrateOptions) -> int:
    """Calibrate, write the file and try it; returns the exit code, :data:`LOSES` if text suffers from it.

    Raises:
        UserError: Some option is wrong; the message names it.
        UnsupportedError: The model's class cannot take Stem's attention function, or has layers that Stem does not run.
    """
    console = progress_console()
    check_counts(windows=options.windows, needles=options.needles)
    if options.length is not None:
        check_counts(length=options.length)
    if not 0 < options.density < 1:
        raise UserError(f"--density: expected a number > 0 and < 1, got {options.density}; 0.2 keeps a fifth of the blocks")
    if not 0 <= options.needle_weight < math.inf:
        raise UserError(f"--needle-weight: expected a number >= 0, got {options.needle_weight}; 0 leaves the answers out")
    config = read_choice("stem", "mass", options.config, options.settings).config
    if config.keep != "mass":
        raise UserError(f"--config: expected keep='mass', got {config.keep!r}; leave keep out, only shares can be calibrated")
    texts = [Text(file.name, read_text(file, "--text")) for file in options.texts] or [stdlib_text()]
    haystack = None if options.haystack is None else read_text(options.haystack, "--haystack")
    device = read_device(options.device)
    check_writable(options.out, "--out")
    _, model, tokenizer = open_model(options.model, device, read_dtype(options.dtype, device), console)
    try:
        kinds = _lessons(options, model, tokenizer, texts, haystack)
        check_density(options.density, [lesson for lessons, _ in kinds for lesson in lessons], config)
        others = other_windows(tokenizer, texts, len(kinds[0][0][0].ids), options.windows)
        found, density = _calibrated(options, model, kinds, config, console)
    except ValueError as error:
        raise UserError(f"calibrate: {error}") from error
    options.out.write_text(found.to_json() + "\n", encoding="utf-8")
    console.print(
        f"wrote {options.out}: density {density:.3f} on these prompts, share {found.share:.3g}", markup=False, soft_wrap=True
    )
    firsts = [lessons[0] for lessons, _ in kinds]
    with _bar(console, "trying it on other windows", None) as tick:
        single, _ = tuned(model, firsts, replace(config, head_factors=None), density, tick)
        ours, theirs = text_losses(model, others, (found, single))
    lost = f"perplexity {math.expm1(ours):+.2%}, with one share for all heads at that density {math.expm1(theirs):+.2%}"
    console.print(f"other windows of the texts: {lost}", markup=False, soft_wrap=True)
    if ours <= max(theirs, _BEARABLE):
        return 0
    console.print("that is a loss: learn from more --windows, or lower --needle-weight", markup=False, soft_wrap=True)
    return LOSES


def _lessons(
    options: CalibrateOptions, model: Model, tokenizer: Tokenizer, texts: list[Text], haystack: str | None
) -> list[tuple[list[Lesson], float]]:
    """Prompts of each kind, and the weight of the kind."""
    limit = context_length(model)
    length = min(limit or _LONGEST_DEFAULT, _LONGEST_DEFAULT) if options.length is None else options.length
    if limit is not None and length > limit:
        raise UserError(f"--length: expected at most {limit}, the model's context, got {length}; lower it")
    kinds = [(text_lessons(tokenizer, texts, length, options.windows), 1.0)]
    if options.needle_weight:
        kinds.append((needle_lessons(tokenizer, haystack, length, options.needles, options.seed), options.needle_weight))
    return kinds


def _calibrated(
    options: CalibrateOptions, model: Model, kinds: list[tuple[list[Lesson], float]], config: StemConfig, console: Console
) -> tuple[StemConfig, float]:
    with _bar(console, "reading backwards", sum(len(lessons) for lessons, _ in kinds)) as tick:
        curves = [(learn(model, lessons, config, options.seed, tick), weight) for lessons, weight in kinds]
    shares = allocate(curves, options.density)
    config = replace(config, head_factors=tuple(map(tuple, (shares / config.share).tolist())))
    with _bar(console, "finding the density", None) as tick:
        return tuned(model, [lessons[0] for lessons, _ in kinds], config, options.density, tick)


@contextmanager
def _bar(console: Console, what: str, total: int | None) -> Iterator[Callable[[], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)
