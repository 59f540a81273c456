"""The runner: measures, cases and contenders, one record at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stem_attention.errors import bad_argument
from stem_evals.contender import DENSE, Contender
from stem_evals.journal import Journal
from stem_evals.measure import Case, Measure


@dataclass(frozen=True)
class Plan:
    """Describe what to run; see :func:`make_plan`.

    Attributes:
        measures: In this order.
        reachable: Contenders that can be built, by prompt length; dense first.
        left_out: Length and name of those that cannot.
        part: ``(I, N)``: the process has every N-th case from the I-th on. All else is about all cases, so that the facts of
            every part's run are the same.
    """

    measures: tuple[Measure, ...]
    reachable: dict[int, list[Contender]]
    left_out: list[tuple[int, str]]
    part: tuple[int, int]

    def cases(self) -> list[tuple[Measure, Case]]:
        """The part's share of all measures' cases, in order."""
        everything = [(measure, case) for measure in self.measures for case in measure.cases()]
        return everything[self.part[0] - 1 :: self.part[1]]

    def tasks(self) -> list[tuple[Measure, Case, Contender]]:
        """Everything to run, in order: all contenders run a case before the next one starts, dense first."""
        return [(measure, case, contender) for measure, case in self.cases() for contender in self.reachable[case.tokens]]


def make_plan(measures: Sequence[Measure], contenders: Sequence[Contender], part: tuple[int, int] = (1, 1)) -> Plan:
    """Put dense in front of the contenders, and find out which of them can be built at which length.

    Raises:
        ValueError: Two contenders or two measures share a name, or there is no such part.
    """
    ordered = list(dict.fromkeys([Contender(DENSE), *contenders]))
    if not 1 <= part[0] <= part[1]:
        raise bad_argument("part", "I/N with I from 1 to N", f"{part[0]}/{part[1]}", "count the parts from 1")
    for kind, names in (("policy", [one.name for one in ordered]), ("measure", [one.name for one in measures])):
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise bad_argument(kind, "each name once", f"{', '.join(twice)} twice", "leave one out")
    lengths = sorted({case.tokens for measure in measures for case in measure.cases()})
    reachable = {tokens: [one for one in ordered if one.is_reachable(tokens)] for tokens in lengths}
    left_out = [(tokens, one.name) for tokens, able in reachable.items() for one in ordered if one not in able]
    return Plan(tuple(measures), reachable, left_out, part)


def run_plan(plan: Plan, journal: Journal) -> Iterator[str]:
    """Run what the journal does not have yet, and keep each record as soon as it is there.

    Yields:
        The name of each task before it runs.

    Raises:
        ValueError: A case cannot be run, or its record holds NaN or infinity; it is not kept.
    """
    for measure, case, contender in plan.tasks():
        if journal.has(measure.name, case.key, contender.name):
            continue
        yield (task := f"{measure.name} {case.key}, {contender.name}")
        about = {"measure": measure.name, "case": case.key, "tokens": case.tokens, "contender": contender.name, **case.about}
        try:
            journal.add({**about, **measure.run(case, contender.at(case.tokens))})
        except ValueError as error:
            raise ValueError(f"{task}: {error}") from error
