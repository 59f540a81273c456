"""The runner: measures, cases and contenders, one record at a time, each kept as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeAlias

from stem_attention.errors import bad_argument
from stem_attention.evaluation.contenders import DENSE, Contender, parse_contender
from stem_attention.evaluation.journal import Journal
from stem_attention.evaluation.measure import Case, Measure, What
from stem_attention.evaluation.prefill import Watcher

Watching: TypeAlias = Callable[[str, int], AbstractContextManager[Watcher]]
"""Opens what shows one task by its name and the prefills it takes, and gives what is told about its attention calls."""


@dataclass(frozen=True)
class Part:
    """A share of the cases, for processes that run side by side: every ``count``-th, from the ``index``-th on, counted from 1.

    Raises:
        ValueError: There is no such part.
    """

    index: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            fix = "count the parts from 1"
            raise bad_argument("part", "I/N with I from 1 to N", f"{self.index}/{self.count}", fix)


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        measures: In this order.
        contenders: Dense first.
        reachable: Contenders that can be built, by prompt length.
        part: Which of the cases. All else is about all of them, so that the facts of every part's run are the same.
    """

    measures: tuple[Measure, ...]
    contenders: tuple[Contender, ...]
    reachable: dict[int, tuple[Contender, ...]]
    part: Part = Part()

    @property
    def left_out(self) -> list[tuple[int, str]]:
        """Length and name of contenders that cannot be built there."""
        return [
            (tokens, contender.name)
            for tokens, able in self.reachable.items()
            for contender in self.contenders
            if contender not in able
        ]

    def cases(self) -> list[tuple[Measure, Case]]:
        """The part's share of all measures' cases, in order."""
        everything = [(measure, case) for measure in self.measures for case in measure.cases()]
        return everything[self.part.index - 1 :: self.part.count]

    def tasks(self) -> list[tuple[Measure, Case, Contender]]:
        """Everything to run, in order: all contenders run a case before the next one starts, dense first."""
        return [(measure, case, contender) for measure, case in self.cases() for contender in self.reachable[case.tokens]]


def make_plan(measures: Sequence[Measure], contenders: Sequence[Contender], part: Part = Part()) -> Plan:
    """Put dense in front, and find out which contenders can be built at which length.

    Args:
        measures: To be run in this order.
        contenders: Beside dense.
        part: Which of the cases to run.

    Raises:
        ValueError: Two contenders or two measures share a name.
    """
    dense = parse_contender(DENSE)
    ordered = (dense, *(contender for contender in dict.fromkeys(contenders) if contender.family != DENSE))
    for kind, names in (("policy", [one.name for one in ordered]), ("measure", [one.name for one in measures])):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise bad_argument(kind, "each name once", f"{', '.join(twice)} twice", "leave one out")
    lengths = sorted({case.tokens for measure in measures for case in measure.cases()})
    reachable = {tokens: tuple(one for one in ordered if one.is_reachable(tokens)) for tokens in lengths}
    return Plan(tuple(measures), ordered, reachable, part)


def run_plan(plan: Plan, journal: Journal, watching: Watching) -> None:
    """Run what the journal does not have yet.

    Args:
        plan: What to run.
        journal: Where records go.
        watching: Opened around each task; tasks that are done already are not opened.
    """
    built: dict[tuple[str, int], What] = {}
    for measure, case, contender in plan.tasks():
        if journal.has(measure.name, case.key, contender.name):
            continue
        place = contender.name, case.tokens
        if place not in built:
            built[place] = contender.at(case.tokens)
        with watching(f"{measure.name} {case.key}, {contender.name}", case.prefills) as watcher:
            record = measure.run(case, built[place], watcher)
        about = {"measure": measure.name, "case": case.key, "tokens": case.tokens, "contender": contender.name}
        journal.add({**about, **case.about, **record})
