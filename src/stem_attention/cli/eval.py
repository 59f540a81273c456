"""``stem-attention eval``: measures of one model under many policies, kept as they come; ``report``: what they come to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from stem_attention import explain
from stem_attention.cli.errors import UserError
from stem_attention.cli.eval_measures import EvalOptions, Setup, make_measures, read_measures, read_setup
from stem_attention.cli.system import cpu_model, progress_console
from stem_attention.evaluation.contenders import Contender, parse_contenders
from stem_attention.evaluation.eval_run import Part, Plan, Watching, make_plan, run_plan
from stem_attention.evaluation.facts import contender_facts, header, model_facts, session_facts, text_facts
from stem_attention.evaluation.journal import Journal, open_journal, read_journal
from stem_attention.evaluation.measure import Record
from stem_attention.evaluation.prefill import Watcher
from stem_attention.evaluation.report import MARKDOWN, write_report
from stem_attention.evaluation.studies import study

DEFAULT_POLICIES = ("stem", "paper")

_NAME_WIDTH = 44


def eval_command(options: EvalOptions, arguments: list[str]) -> int:
    """Run what the directory does not have yet, and write the report; returns the exit code.

    An interrupted run leaves its finished records and a report of them.

    Args:
        options: Option values as they came.
        arguments: The command line after the command's name, to be kept.

    Raises:
        UserError: Some option is wrong, or the directory was made with other facts.
        UnsupportedError: The model's class cannot take Stem's attention function, or its text cannot be scored.
    """
    console = progress_console()
    read_measures(options.measures)
    part = read_part(options.part)
    try:
        contenders = read_contenders(options)
        setup = read_setup(options, console)
        with console.status("making the cases"):
            measures, settings = make_measures(setup)
            plan = make_plan(measures, contenders, part)
        journal = open_journal(options.out, _header(options, setup, plan, settings, arguments))
    except ValueError as error:
        raise UserError(f"eval: {error}") from error
    except OSError as error:
        raise UserError(f"--out: cannot write {options.out}: {error.strerror}; choose another directory") from error
    _say_what_is_left(console, plan, journal)
    try:
        with _bars(console, setup, plan, journal) as watching:
            run_plan(plan, journal, watching)
    except ValueError as error:
        raise UserError(f"eval: {error}") from error
    finally:
        if journal.records:
            with console.status("writing the report"):
                write_report([journal], options.out)
            console.print(f"wrote {options.out / MARKDOWN}", markup=False, soft_wrap=True)
    return 0


def report_command(directories: list[Path], out: Path | None) -> int:
    """Write one report of some directories; returns the exit code.

    Raises:
        UserError: One of them is none of ``eval``, they contradict each other, or there is nothing to report.
    """
    if out is None and len(directories) > 1:
        raise UserError("--out: expected a directory for the report of several runs, got none; name one")
    target = directories[0] if out is None else out
    try:
        journals = [read_journal(directory) for directory in directories]
        if not any(journal.records for journal in journals):
            raise UserError(f"report: {', '.join(map(str, directories))} hold no records yet; run `stem-attention eval` first")
        with progress_console().status("writing the report"):
            write_report(journals, target)
    except ValueError as error:
        raise UserError(f"report: {error}") from error
    except OSError as error:
        raise UserError(f"--out: cannot write {target}: {error.strerror}; choose another directory") from error
    print(target / MARKDOWN)
    return 0


def read_contenders(options: EvalOptions) -> list[Contender]:
    """The study's contenders, then those named one by one; the defaults where there is neither.

    Raises:
        ValueError: There is no such study, or a spec is wrong.
    """
    named = options.policies or ([] if options.study else list(DEFAULT_POLICIES))
    return [*(study(options.study) if options.study else []), *parse_contenders(named)]


def read_part(text: str) -> Part:
    """The part that ``I/N`` names.

    Raises:
        UserError: It names none.
    """
    try:
        index, count = map(int, text.split("/"))
        return Part(index, count)
    except ValueError as error:
        raise UserError(f"--part: expected I/N with I from 1 to N such as 2/8, got {text!r}; count the parts from 1") from error


def _header(options: EvalOptions, setup: Setup, plan: Plan, settings: dict[str, Record], arguments: list[str]) -> Record:
    device = setup.model.device
    on_cpu = device.type == "cpu"
    lengths: dict[str, tuple[Contender, list[int]]] = {one.name: (one, []) for one in plan.contenders}
    for tokens, able in plan.reachable.items():
        for contender in able:
            lengths[contender.name][1].append(tokens)
    return header(
        model=model_facts(setup.source, setup.model),
        dtype=setup.dtype,
        device=cpu_model() if on_cpu else str(torch.get_device_module(device).get_device_name(device)),
        texts=text_facts(setup.texts),
        contenders={name: contender_facts(one, able) for name, (one, able) in lengths.items()},
        settings=settings,
        session={**session_facts(arguments, options.commit), "backend": backend_of(setup)},
    )


def backend_of(setup: Setup) -> str | None:
    """The backend that runs the default's sparse attention in this model."""
    text = setup.model.config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return explain(device=setup.model.device, dtype=setup.dtype, head_dim=head_dim).chosen


def _say_what_is_left(console: Console, plan: Plan, journal: Journal) -> None:
    if journal.dropped:
        console.print("dropped a half-written last record of the run before")
    if plan.part.count > 1:
        everything = sum(len(measure.cases()) for measure in plan.measures)
        console.print(f"part {plan.part.index}/{plan.part.count}: {len(plan.cases())} of {everything} cases")
    done = sum(journal.has(measure.name, case.key, one.name) for measure, case, one in plan.tasks())
    if done:
        console.print(f"{done} of {len(plan.tasks())} records are there already")
    for tokens, name in plan.left_out:
        console.print(
            f"{name} is left out at {tokens} tokens: its density cannot be reached there", markup=False, soft_wrap=True
        )


@dataclass(frozen=True)
class _Bars:
    """Records of the run, and layers of the present one's prefills."""

    progress: Progress
    run: TaskID
    layers: TaskID
    count: int

    @contextmanager
    def watching(self, name: str, prefills: int) -> Iterator[Watcher]:
        self.progress.reset(self.layers, description=name, total=self.count * prefills)
        yield lambda call: self.progress.advance(self.layers)
        self.progress.advance(self.run)


@contextmanager
def _bars(console: Console, setup: Setup, plan: Plan, journal: Journal) -> Iterator[Watching]:
    tasks = plan.tasks()
    left = sum(not journal.has(measure.name, case.key, one.name) for measure, case, one in tasks)
    name = TextColumn("{task.description}", table_column=Column(width=_NAME_WIDTH, no_wrap=True, overflow="ellipsis"))
    columns = (name, BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        run = progress.add_task("records", total=left)
        count = setup.model.config.get_text_config().num_hidden_layers
        yield _Bars(progress, run, progress.add_task("", total=count), count).watching
