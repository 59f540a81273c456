"""report.md, report.html and pictures from one or several directories of records."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stem_attention.errors import bad_argument
from stem_attention.evaluation.cost_report import relative_costs
from stem_attention.evaluation.journal import Journal, differences, key_of
from stem_attention.evaluation.measure import Record, Section, Table
from stem_attention.evaluation.render import render_html, render_markdown
from stem_attention.evaluation.scores import columns
from stem_attention.evaluation.scores_report import best_table, pareto_figures, side_by_side

MARKDOWN, HTML = "report.md", "report.html"

SECTIONS = {
    "perplexity": "perplexity_report",
    "needle": "needle_report",
    "layers": "layers_plots",
    "cost": "cost_report",
    "stress": "stress",
    "ruler": "lm_tasks",
    "longbench": "lm_tasks",
}
"""Measures, and the modules whose ``section`` tells what their records come to."""


@dataclass(frozen=True)
class Chapter:
    """All records of one model."""

    title: str
    headers: tuple[Record, ...]
    records: tuple[Record, ...]


def write_report(journals: Sequence[Journal], out: Path) -> None:
    """Write the report of some directories into one.

    Args:
        journals: What was recorded; the same record in two of them counts once.
        out: Directory to write into; made if it is not there.

    Raises:
        ValueError: Two directories say different things about the same model, text or contender.
    """
    out.mkdir(parents=True, exist_ok=True)
    sections = [section for chapter in gather(journals) for section in chapter_sections(chapter)]
    for section in sections:
        for stem, figure in section.figures:
            figure.savefig(out / f"{stem}.png")
    (out / MARKDOWN).write_text(render_markdown("Evaluation", sections), encoding="utf-8")
    (out / HTML).write_text(render_html("Evaluation", sections, out), encoding="utf-8")


def gather(journals: Sequence[Journal]) -> list[Chapter]:
    """Put the directories of each model together.

    Raises:
        ValueError: They contradict each other; the message says where.
    """
    groups: dict[str, list[Journal]] = {}
    for journal in journals:
        groups.setdefault(json.dumps([journal.header["model"], journal.header["dtype"]]), []).append(journal)
    names = [group[0].header["model"]["name"] for group in groups.values()]
    chapters = []
    for group, name in zip(groups.values(), names, strict=True):
        first, *others = group
        for other in others:
            # Times differ between devices, and say so themselves; what was measured must not.
            found = differences(first.header, {**other.header, "device": first.header["device"]})
            if found:
                got = f"{first.directory} and {other.directory} with different {'; '.join(found)}"
                raise bad_argument("directories", "runs of the same facts", got, "report them apart")
        records = {key_of(record): record for journal in reversed(group) for record in journal.records}
        ordered = [record for journal in group for record in journal.records if records.get(key_of(record)) is record]
        title = name if names.count(name) == 1 else f"{name}, {first.header['dtype']}"
        chapters.append(Chapter(title, tuple(journal.header for journal in group), tuple(ordered)))
    return chapters


def chapter_sections(chapter: Chapter) -> list[Section]:
    """What a model's records come to, each measure on its own and then all together."""
    by_measure: dict[str, list[Record]] = {}
    for record in chapter.records:
        by_measure.setdefault(record["measure"], []).append(record)
    contenders: dict[str, Record] = {}
    for header in chapter.headers:
        contenders.update(header["contenders"])
    families = {name: contender["family"] for name, contender in contenders.items()}
    found, costs = columns(chapter.records), relative_costs(by_measure.get("cost", []))
    overview = Section(
        f"{chapter.title}: overview",
        (_facts(chapter), *best_table(found, families), *side_by_side(found, costs)),
        tuple(pareto_figures(found, families, costs)),
    )
    details = [_measure_section(name, chapter.title, records) for name, records in by_measure.items()]
    sections = [overview, *details, Section(f"{chapter.title}: contenders", (_contenders(contenders),))]
    prefix = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in chapter.title)
    return [
        Section(one.title, one.tables, tuple((f"{prefix}-{stem}", figure) for stem, figure in one.figures)) for one in sections
    ]


def _measure_section(measure: str, title: str, records: list[Record]) -> Section:
    module: Any = importlib.import_module(f"stem_attention.evaluation.{SECTIONS[measure]}")
    section: Section = module.section(records)
    return Section(f"{title}: {section.title}", section.tables, section.figures)


def _facts(chapter: Chapter) -> Table:
    first = chapter.headers[0]
    sessions = [session for header in chapter.headers for session in header["sessions"]]
    texts = {name: text for header in chapter.headers for name, text in header["texts"].items()}

    def every(values: Sequence[object]) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in values))

    rows = [
        ("model", first["model"]["name"]),
        ("sha256 of the weights", str(first["model"]["sha256"])),
        ("revision", str(first["model"]["revision"])),
        ("dtype", first["dtype"]),
        ("device", every([header["device"] for header in chapter.headers])),
        ("commit", every([session["commit"] for session in sessions])),
        ("backend", every([session["backend"] for session in sessions if session.get("backend")]) or "not on record"),
        ("changed since the commit", every([path for session in sessions for path in session["uncommitted"]]) or "nothing"),
        *((name, every([session["versions"][name] for session in sessions])) for name in sessions[0]["versions"]),
        *(("command", command) for command in dict.fromkeys(session["command"] for session in sessions)),
        *((f"text {name}", f"sha256 {text['sha256']}, {text['characters']} characters") for name, text in texts.items()),
        ("records", str(len(chapter.records))),
    ]
    return Table("What was run", ("fact", "value"), tuple((name, value) for name, value in rows if value != "None"))


def _contenders(contenders: dict[str, Record]) -> Table:
    rows = tuple(
        (name, contender["family"], tokens, json.dumps(described))
        for name, contender in contenders.items()
        for tokens, described in contender["at"].items()
    )
    return Table("What each contender ran", ("contender", "family", "tokens", "settings"), rows)
