"""The commands ``eval``, which measures a model under many policies, and ``report``, which joins what it left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from stem_attention.cli import options
from stem_attention.cli.errors import UserError, blaming
from stem_attention.cli.system import device_name, output, progress_console
from stem_attention.errors import nearest
from stem_attention.models.prompts import KINDS
from stem_evals.contender import Contender, parse_contender
from stem_evals.studies import STUDIES

if TYPE_CHECKING:
    from stem_evals.journal import Journal
    from stem_evals.measure import Measure
    from stem_evals.report import Chapter
    from stem_evals.runner import Plan

DEFAULT_POLICIES = ("mass", "paper")
LONGEST_DEFAULT = 8192
_UP_TO_CONTEXT: Any = None  # no lengths: the model's context, up to LONGEST_DEFAULT
_NAME = TextColumn("{task.description}", table_column=Column(width=44, no_wrap=True, overflow="ellipsis"))
_COLUMNS = (_NAME, BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())

_NEEDLES, _HARNESS = "Needles", "RULER and LongBench"  # groups of options in --help
# By the argument that an error names.
_OPTIONS = {
    "kind": "--kinds", "depth": "--depths", "tokens": "--lengths",
    **{name: f"--{name}" for name in ("count", "data", "haystack", "lengths", "out", "part", "tasks")},
}  # fmt: skip

MEASURES = ("perplexity", "needle", "layers", "cost", "ruler", "longbench")


def _policy(text: str) -> Contender:
    try:
        return parse_contender(text)
    except ValueError as error:
        raise typer.BadParameter(str(error).removeprefix("policy: ")) from error


def _listed(option: str, text: str, kind: Callable[[str], Any] = str, between: str = ",") -> list[Any]:
    try:
        return [kind(part.strip()) for part in text.split(between) if part.strip()]
    except ValueError as error:
        raise UserError(f"{option}: expected numbers with {between!r} between, got {text!r}; correct it") from error


def evaluate(
    context: typer.Context,
    measures: Annotated[list[str], typer.Argument(metavar="MEASURE...", help=", ".join(MEASURES))],
    out: Annotated[Path, options.option("Directory for records and report; the same command again goes on there.", "DIR")],
    model: options.Model = None,
    policy: Annotated[
        list[Contender] | None,
        typer.Option(
            parser=_policy,
            metavar="SPEC",
            help="Contender beside dense, as mass:share=8, heads.json, sink-window@0.18 or uniform@stem. Repeatable.",
            show_default=" and ".join(DEFAULT_POLICIES),
        ),
    ] = None,
    study: Annotated[str | None, typer.Option(metavar="|".join(STUDIES), help="A set of contenders.")] = None,
    lengths: options.Lengths = _UP_TO_CONTEXT,
    text: options.TextFiles = None,
    windows: Annotated[int, options.option("Windows of each text and length.", min=1)] = 4,
    kinds: Annotated[
        str, options.option(f"Needles, with commas between: {', '.join(KINDS)}.", "NAME,...", "all", rich_help_panel=_NEEDLES)
    ] = ",".join(KINDS),
    depths: Annotated[
        str, options.option("Where needles stand: 0 start of the text, 1 end.", "X,X,...", rich_help_panel=_NEEDLES)
    ] = "0,0.25,0.5,0.75,1",
    samples: Annotated[int, options.option("Prompts of each kind, length and depth.", min=1, rich_help_panel=_NEEDLES)] = 2,
    count: Annotated[int, options.option("Numbers in a prompt of every kind but single.", min=1, rich_help_panel=_NEEDLES)] = 4,
    haystack: options.Haystack = None,
    no_chat_template: options.NoChatTemplate = False,
    tasks: Annotated[
        str | None, options.option("Tasks, with commas between.", "NAME,...", "all that can run", rich_help_panel=_HARNESS)
    ] = None,
    limit: Annotated[int, options.option("Prompts of each task.", min=1, rich_help_panel=_HARNESS)] = 50,
    data: Annotated[
        Path | None,
        options.option("Folder with the files of longbench's tasks.", "DIR", "what lm-eval fetches", rich_help_panel=_HARNESS),
    ] = None,
    seed: options.Seed = 0,
    device: options.Device = options.AUTO,
    dtype: options.Dtype = options.AUTO,
    commit: Annotated[
        str | None,
        options.option(
            "Commit to put on record where there is no repository.", "SHA", "what git says", rich_help_panel=options.RUNS
        ),
    ] = None,
    part: Annotated[
        str,
        options.option(
            "Run every N-th case from the I-th on: N processes share a grid, an --out each.",
            "I/N",
            rich_help_panel=options.RUNS,
        ),
    ] = "1/1",
) -> int:
    """Measure a model dense and under any policies, and write a report with intervals and plots.

    Records are kept as they come: an interrupted command goes on where it stopped when it is given again.
    """
    from stem_attention.cli.job import open_model
    from stem_attention.models.load import context_length
    from stem_attention.models.texts import Text, stdlib_text
    from stem_evals.cost import Cost
    from stem_evals.facts import header
    from stem_evals.harness import Harness
    from stem_evals.journal import open_journal
    from stem_evals.layers import Layers
    from stem_evals.needle import Needle
    from stem_evals.perplexity import Perplexity
    from stem_evals.report import write_report
    from stem_evals.runner import make_plan, run_plan

    places, share = _listed("--depths", depths, float), _listed("--part", part, int, "/")
    if len(share) != 2:
        raise UserError(f"--part: expected I/N such as 2/8, got {part!r}; count the parts from 1")
    if unknown := [name for name in measures if name not in MEASURES]:
        raise UserError(
            f"MEASURE: expected among {', '.join(MEASURES)}, got {unknown[0]!r}; {nearest(unknown[0], MEASURES, 'correct it')}"
        )
    if study and study not in STUDIES:
        raise UserError(
            f"--study: expected one of {', '.join(STUDIES)}, got {study!r}; {nearest(study, STUDIES, 'choose another')}"
        )
    if data and "longbench" not in measures:
        raise UserError("--data: expected longbench among the measures, which alone reads such a folder; leave it out")
    chosen = _listed("--tasks", tasks) if tasks else None
    named = policy or ([] if study else [parse_contender(spec) for spec in DEFAULT_POLICIES])
    contenders = [*(STUDIES[study]() if study else []), *named]
    console = progress_console()
    source, loaded, tokenizer = open_model(model, device, options.torch_dtype(dtype, device), console)
    reach = context_length(loaded)
    if lengths and reach and max(lengths) > reach:
        raise UserError(f"--lengths: expected at most {reach}, the model's context, got {max(lengths)}; lower it")
    tokens = sorted(set(lengths or [min(reach or LONGEST_DEFAULT, LONGEST_DEFAULT)]))
    texts = text or [stdlib_text()]
    windowed = loaded, tokenizer, texts, tokens, windows
    makers: dict[str, Callable[[], Measure]] = {
        "perplexity": lambda: Perplexity(*windowed),
        "layers": lambda: Layers(*windowed),
        "cost": lambda: Cost(*windowed),
        "needle": lambda: Needle(
            loaded,
            tokenizer,
            _listed("--kinds", kinds),
            tokens,
            places,
            samples,
            seed=seed,
            count=count,
            haystack=Text("haystack", haystack) if haystack else None,
            use_template=not no_chat_template,
        ),
        "ruler": lambda: Harness("ruler", loaded, tokenizer, tokens, limit, chosen, seed=seed),
        "longbench": lambda: Harness("longbench", loaded, tokenizer, tokens, limit, chosen, data),
    }
    with _one_line("eval", out):
        with console.status("making the cases"):
            plan = make_plan([makers[one]() for one in dict.fromkeys(measures)], contenders, (share[0], share[1]))
            facts = header(plan, source, loaded, device_name(device), texts, context.obj or sys.argv[1:], commit)
            journal = open_journal(out, facts)
        left = _say_what_is_left(console, plan, journal)
        try:
            with Progress(*_COLUMNS, console=console) as progress:
                bar = progress.add_task("", total=left)
                for done, task in enumerate(run_plan(plan, journal)):
                    progress.update(bar, description=task, completed=done)
                progress.update(bar, completed=left)
        finally:
            if journal.records:
                _show(write_report([journal], out), out)
    return 0


def report(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Directories that eval made.")],
    out: Annotated[Path | None, options.option("Directory for the report.", "DIR", "DIR itself, if there is one only")] = None,
) -> int:
    """Join the records of several eval runs into one report."""
    from stem_evals.journal import read_journal
    from stem_evals.report import write_report

    if out is None and len(directories) > 1:
        raise UserError("--out: expected a directory for the report of several runs, got none; name one")
    target = out or directories[0]
    with blaming("report: ", out="DIR"):
        journals = [read_journal(directory) for directory in directories]
    with _one_line("report", target):
        if not any(journal.records for journal in journals):
            raise UserError(f"report: {', '.join(map(str, directories))} hold no records yet; run `stem-evals eval` first")
        _show(write_report(journals, target), target)
    return 0


@contextmanager
def _one_line(command: str, out: Path) -> Iterator[None]:
    """Turn what a user can put right into one line."""
    try:
        with blaming(f"{command}: ", **_OPTIONS):
            yield
    except OSError as error:
        raise UserError(f"--out: cannot write {out}: {error.strerror}; choose another directory") from error


def _say_what_is_left(console: Console, plan: Plan, journal: Journal) -> int:
    """Tell what is there and what cannot be run; returns the number of records to make."""
    if journal.dropped:
        console.print("dropped a half-written last record of the run before")
    if plan.part[1] > 1:
        everything = sum(len(measure.cases()) for measure in plan.measures)
        console.print(f"part {plan.part[0]}/{plan.part[1]}: {len(plan.cases())} of {everything} cases")
    if done := sum(journal.has(measure.name, case.key, one.name) for measure, case, one in plan.tasks()):
        console.print(f"{done} of {len(plan.tasks())} records are there already")
    for tokens, name in plan.left_out:
        console.print(f"{name} is left out at {tokens} tokens: its density is out of reach", markup=False, soft_wrap=True)
    return len(plan.tasks()) - done


def _show(chapters: list[Chapter], out: Path) -> None:
    """Print what a report's main table says, a table a measure and length, and where the rest is."""
    from stem_evals.report import MARKDOWN

    console = output()
    for chapter in chapters:
        for (tokens, measure), part in chapter.scores.groupby(["tokens", "measure"], sort=False) if len(chapter.scores) else ():
            title = f"{chapter.title}, {tokens} tokens: {measure}"
            # A name that is too long goes on in the next line: cut short, many would look alike.
            heads = [Column(name, overflow="fold") for name in part.columns[2:]]
            table = Table(*heads, title=title, title_justify="left", box=SIMPLE_HEAD)
            for row in part.iloc[:, 2:].itertuples(index=False):
                table.add_row(*row)
            console.print(table)
        if chapter.note:
            console.print(chapter.note, markup=False)
    console.print(f"wrote {out / MARKDOWN}", markup=False, soft_wrap=True)
