"""The runner: order, what it skips, and what it keeps when it is cut short."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from stem_evals.contender import parse_contender
from stem_evals.journal import Journal, open_journal
from stem_evals.measure import Case
from stem_evals.runner import Plan, make_plan, run_plan

from .records import HEADER


class Noting:
    """A measure that notes what it is asked to run."""

    def __init__(self, name: str, cases: Sequence[Case], fails_at: int = -1) -> None:
        self.name, self.settings, self._cases, self._fails_at = name, {}, cases, fails_at
        self.runs: list[tuple[str, object]] = []
        self.record: dict[str, object] = {}

    def cases(self) -> Sequence[Case]:
        return self._cases

    def run(self, case, policy) -> dict:
        if len(self.runs) == self._fails_at:
            raise KeyboardInterrupt
        self.runs.append((case.key, policy))
        return {"density": 1.0, "seconds": 0.0, **self.record}


CASES = [Case("a", 2048, {"depth": 0.5}), Case("b", 4096)]


def contenders(*specs: str) -> list:
    return [parse_contender(spec) for spec in specs]


def run(plan: Plan, journal: Journal) -> list[str]:
    """Names of the tasks."""
    return list(run_plan(plan, journal))


def journal(path: Path) -> Journal:
    return open_journal(path, HEADER)


def test_every_contender_runs_a_case_before_the_next_and_dense_runs_first(tmp_path):
    measure = Noting("noting", CASES)
    names = run(make_plan([measure], contenders("stem", "dense", "paper", "stem")), journal(tmp_path))  # each once
    assert names[:2] == ["noting a, dense", "noting a, stem"]
    assert [case for case, _ in measure.runs] == ["a"] * 3 + ["b"] * 3
    assert [policy is None for _, policy in measure.runs] == [True, False, False] * 2
    records = journal(tmp_path).records
    assert records[1] == {
        "measure": "noting", "case": "a", "tokens": 2048, "contender": "stem", "depth": 0.5, "density": 1.0, "seconds": 0.0,
    }  # fmt: skip


def test_interrupted_run_keeps_what_is_done_and_goes_on_there(tmp_path):
    whole, rest, again = (Noting("noting", CASES) for _ in range(3))
    run(make_plan([whole], contenders("stem")), journal(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        run(make_plan([Noting("noting", CASES, 3)], contenders("stem")), journal(tmp_path / "cut"))
    assert len(journal(tmp_path / "cut").records) == 3
    run(make_plan([rest], contenders("stem")), journal(tmp_path / "cut"))
    assert len(rest.runs) == 1
    assert journal(tmp_path / "cut").records == journal(tmp_path / "whole").records
    run(make_plan([again], contenders("stem")), journal(tmp_path / "cut"))
    assert again.runs == []


def test_contender_that_cannot_be_built_at_a_length_is_left_out_there_alone(tmp_path):
    measure = Noting("noting", [Case("short", 1024), Case("long", 65536)])
    plan = make_plan([measure], contenders("stem@0.1"))
    assert plan.left_out == [(1024, "stem@0.1")]
    assert [(case.key, one.name) for _, case, one in plan.tasks()] == [
        ("short", "dense"),
        ("long", "dense"),
        ("long", "stem@0.1"),
    ]


def test_parts_share_the_cases_and_every_case_keeps_all_its_contenders():
    measures = [Noting("one", [Case(str(n), 2048) for n in range(5)]), Noting("two", [Case(str(n), 4096) for n in range(4)])]
    whole = make_plan(measures, contenders("stem", "paper"))
    parts = [make_plan(measures, contenders("stem", "paper"), (index, 4)) for index in range(1, 5)]
    shares = [[(measure.name, case.key) for measure, case in part.cases()] for part in parts]
    assert shares[1] == [("one", "1"), ("two", "0")]
    assert [len(share) for share in shares] == [3, 2, 2, 2]
    assert sorted(case for share in shares for case in share) == [(measure.name, case.key) for measure, case in whole.cases()]
    assert all([one.name for *_, one in part.tasks()][:3] == ["dense", "stem", "paper"] for part in parts)
    assert sum(len(part.tasks()) for part in parts) == len(whole.tasks())
    assert all(part.reachable == whole.reachable for part in parts)


def test_directory_gains_the_cases_of_another_part(tmp_path):
    for index in (2, 1, 2):
        run(make_plan([Noting("noting", CASES)], contenders("stem"), (index, 2)), journal(tmp_path))
    assert [record["case"] for record in journal(tmp_path).records] == ["b", "b", "a", "a"]


@pytest.mark.parametrize(("index", "count"), [(0, 8), (9, 8), (0, 0), (-1, 2)])
def test_part_that_is_none_is_refused(index, count):
    with pytest.raises(ValueError, match="part: expected I/N"):
        make_plan([], [], (index, count))


def test_measures_are_named_once():
    with pytest.raises(ValueError, match="measure: expected each name once"):
        make_plan([Noting("same", CASES), Noting("same", CASES)], [])


@pytest.mark.parametrize("bad", [{"loss": float("nan")}, {"buckets": [{"kl": float("inf")}]}])
def test_a_record_that_json_cannot_hold_ends_the_run_in_words_and_is_not_kept(tmp_path, bad):
    measure = Noting("noting", CASES)
    measure.record = bad
    with pytest.raises(ValueError, match="noting a, dense: record: expected finite numbers, got NaN or infinity"):
        run(make_plan([measure], contenders("stem")), journal(tmp_path))
    assert journal(tmp_path).records == []
