"""report.md and pictures from one or several directories of records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from stem_attention.errors import bad_argument
from stem_evals.details import DETAILS, Part, RelativeCost, relative_costs
from stem_evals.figures import draw_pareto
from stem_evals.journal import Journal, differences, key_of, merge_contenders
from stem_evals.measure import Record
from stem_evals.scores import EQUAL, Column, best_table, columns, score_table

MARKDOWN = "report.md"


@dataclass(frozen=True)
class Chapter:
    """All records of one model.

    Attributes:
        title: The model's name.
        header: The directories' headers joined.
        records: Each once.
    """

    title: str
    header: Record
    records: list[Record]

    @property
    def scores(self) -> pd.DataFrame:
        """Every contender on every measure: the table that a terminal shows."""
        costs = relative_costs([record for record in self.records if record["measure"] == "cost"])
        return score_table(columns(self.records), {place: cost.text for place, cost in costs.items()})

    @property
    def note(self) -> str:
        """Lengths that were measured sparse, though the machine runs them dense by itself; empty where there are none."""
        limits = {session["dense_below"] for session in self.header["sessions"] if session.get("dense_below")}
        short = sorted({record["tokens"] for record in self.records if limits and record["tokens"] < min(limits)})
        said = "Policies were run sparse at every length. By itself the library runs prompts of fewer than"
        listed = ", ".join(map(str, short))
        return f"{said} {min(limits)} tokens dense on this machine, here those of {listed}." if short else ""


def write_report(journals: Sequence[Journal], out: Path) -> list[Chapter]:
    """Write the report of some directories into one.

    Args:
        journals: What was recorded; the same record in two of them counts once.
        out: Directory to write into; made if it is not there.

    Raises:
        ValueError: Two directories say different things about the same model, text or contender.
    """
    out.mkdir(parents=True, exist_ok=True)
    chapters, lines = gather(journals), ["# Evaluation"]
    for chapter in chapters:
        lines.append(f"## {chapter.title}")
        prefix = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in chapter.title)
        for part in chapter_parts(chapter):
            if isinstance(part.content, Figure):
                _caption(part.content, chapter)
                file = out / f"{prefix}-{part.title}.png"
                part.content.savefig(file)
                lines.append(f"![{part.title}]({file.name.replace(' ', '%20')})")
            elif not part.content.empty:
                lines += [f"### {part.title}", *filter(None, [part.note]), _markdown(part.content)]
    (out / MARKDOWN).write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return chapters


def _caption(figure: Figure, chapter: Chapter) -> None:
    """Put the model and the devices under a picture's heading: it must tell what it shows where the report is not beside it."""
    devices = ", ".join(dict.fromkeys(map(str, chapter.header["device"])))
    figure.suptitle(f"{figure.get_suptitle()}\n{chapter.title}, {chapter.header['dtype']}, {devices}", fontsize=10)


def _markdown(table: pd.DataFrame) -> str:
    escaped = table.map(lambda cell: str(cell).replace("|", "\\|").replace("\n", " "))
    return str(escaped.to_markdown(index=False, disable_numparse=True))


def gather(journals: Sequence[Journal]) -> list[Chapter]:
    """Put the directories of each model together.

    Raises:
        ValueError: They contradict each other; the message says where.
    """
    groups: dict[str, list[Journal]] = {}
    for journal in journals:
        groups.setdefault(json.dumps([journal.header["model"], journal.header["dtype"]]), []).append(journal)
    names, chapters = [group[0].header["model"]["name"] for group in groups.values()], []
    for group, name in zip(groups.values(), names, strict=True):
        first, *others = group
        header = dict(first.header, device=[first.header["device"]])
        for other in others:
            # Times differ between devices, and say so themselves; what was measured must not.
            if found := differences(first.header, {**other.header, "device": first.header["device"]}):
                got = f"{first.directory} and {other.directory} with different {'; '.join(found)}"
                raise bad_argument("directories", "runs of the same facts", got, "report them apart")
            header["contenders"] = merge_contenders(header["contenders"], other.header["contenders"])
            header["texts"] = {**header["texts"], **other.header["texts"]}
            header["sessions"] = [*header["sessions"], *other.header["sessions"]]
            header["device"] = [*header["device"], other.header["device"]]
        records = {key_of(record): record for journal in reversed(group) for record in journal.records}
        ordered = [record for journal in group for record in journal.records if records.get(key_of(record)) is record]
        title = name if names.count(name) == 1 else f"{name}, {header['dtype']}"
        chapters.append(Chapter(title, header, ordered))
    return chapters


def chapter_parts(chapter: Chapter) -> list[Part]:
    """Describe what a model's records come to: all measures together, then what is peculiar to each."""
    families = {name: contender["family"] for name, contender in chapter.header["contenders"].items()}
    found = columns(chapter.records)
    by_measure: dict[str, list[Record]] = {}
    for record in chapter.records:
        by_measure.setdefault(record["measure"], []).append(record)
    return [
        Part("What was run", _facts(chapter), chapter.note),
        Part("Against dense", chapter.scores, _SCORES_NOTE),
        Part(f"Best at equal density (within {EQUAL:.0%})", best_table(found, families), _BEST_NOTE),
        *pareto(found, families, relative_costs(by_measure.get("cost", []))),
        *(part for measure, mine in by_measure.items() if measure in DETAILS for part in DETAILS[measure](mine)),
    ]


_SCORES_NOTE = (
    "Means with 95 % intervals: Wilson's for shares, else Student's t over cases. Minus dense: on the same prompts, with "
    "Bonett and Price's interval for shares; in percentage points for shares, in per cent for perplexity. Density: kept share "
    "of the causal block pairs, mean over layers. Who kept everything is not compared. What each contender is: run.json."
)
_BEST_NOTE = (
    "The lead is the best's minus the other's, case by case, with its 95 % interval; in per cent for perplexity, in percentage "
    "points for shares. Oracles look at the true attention and do not compete."
)


def pareto(found: Sequence[Column], families: Mapping[str, str], costs: Mapping[tuple[int, str], RelativeCost]) -> list[Part]:
    """Accuracy against density and against time, a picture a prompt length with two sparse contenders to draw."""
    parts = []
    for tokens in dict.fromkeys(column.tokens for column in found):
        mine = [column for column in found if column.tokens == tokens]
        times = {name: cost.ratio.mean for (length, name), cost in costs.items() if length == tokens}
        hollow = [name for (length, name), cost in costs.items() if length == tokens and not cost.fused]
        timed = [column for column in mine if set(column.sparse) & set(times)]
        if any(len(column.sparse) > 1 for column in mine):
            picture = draw_pareto(mine, families, f"Accuracy against density, {tokens} tokens")
            parts.append(Part(f"pareto-{tokens}", picture))
        if any(len(set(column.sparse) & set(times)) > 1 for column in timed):
            picture = draw_pareto(timed, families, f"Accuracy against attention time, {tokens} tokens", times, hollow)
            parts.append(Part(f"pareto-time-{tokens}", picture))
    return parts


def _facts(chapter: Chapter) -> pd.DataFrame:
    header, sessions = chapter.header, chapter.header["sessions"]
    facts = {
        "model": [header["model"]["name"]],
        "sha256 of the weights": [header["model"]["sha256"]],
        "revision": [header["model"]["revision"]],
        "dtype": [header["dtype"]],
        "device": header["device"],
        "commit": [session["commit"] for session in sessions],
        "backend": [session.get("backend") for session in sessions],
        **{name: [session["versions"].get(name) for session in sessions] for name in sessions[0]["versions"]},
        **{f"sha256 of {name}": [text["sha256"]] for name, text in header["texts"].items()},
        "records": [len(chapter.records)],
        "command": [session["command"] for session in sessions],
    }
    said = {name: dict.fromkeys(str(value) for value in values if value is not None) for name, values in facts.items()}
    return pd.DataFrame([(name, ", ".join(values)) for name, values in said.items() if values], columns=["fact", "value"])
