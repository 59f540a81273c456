"""The runner: order, what it skips, and what it keeps when it is cut short."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from stem_attention.evaluation.contenders import parse_contender
from stem_attention.evaluation.eval_run import Part, make_plan, run_plan
from stem_attention.evaluation.journal import Journal, open_journal
from stem_attention.evaluation.measure import Case

HEADER = {part: {} for part in ("format", "model", "dtype", "device", "texts", "settings", "contenders")} | {"sessions": []}


class Noting:
    """A measure that notes what it is asked to run."""

    def __init__(self, name: str, cases: Sequence[Case], fails_at: int = -1) -> None:
        self.name, self._cases, self._fails_at = name, cases, fails_at
        self.runs: list[tuple[str, object]] = []

    def cases(self) -> Sequence[Case]:
        return self._cases

    def run(self, case, what, watcher) -> dict:
        if len(self.runs) == self._fails_at:
            raise KeyboardInterrupt
        self.runs.append((case.key, what))
        return {"density": 1.0, "seconds": 0.0}


CASES = [Case("a", 2048, {"depth": 0.5}), Case("b", 4096)]


@contextmanager
def watching(name: str, prefills: int) -> Iterator[object]:
    yield lambda call: None


def contenders(*specs: str) -> list:
    return [parse_contender(spec) for spec in specs]


def journal(path: Path) -> Journal:
    return open_journal(path, HEADER)


def test_every_contender_runs_a_case_before_the_next_and_dense_runs_first(tmp_path: Path) -> None:
    measure = Noting("noting", CASES)
    run_plan(make_plan([measure], contenders("stem", "paper")), journal(tmp_path), watching)
    assert [case for case, _ in measure.runs] == ["a"] * 3 + ["b"] * 3
    assert [what is None for _, what in measure.runs] == [True, False, False] * 2
    records = journal(tmp_path).records
    assert records[1] == {
        "measure": "noting", "case": "a", "tokens": 2048, "contender": "stem", "depth": 0.5, "density": 1.0, "seconds": 0.0,
    }  # fmt: skip


def test_dense_named_by_the_user_runs_once(tmp_path: Path) -> None:
    assert [one.name for one in make_plan([], contenders("stem", "dense", "stem")).contenders] == ["dense", "stem"]


def test_interrupted_run_keeps_what_is_done_and_goes_on_there(tmp_path: Path) -> None:
    whole, rest, again = (Noting("noting", CASES) for _ in range(3))
    run_plan(make_plan([whole], contenders("stem")), journal(tmp_path / "whole"), watching)
    with pytest.raises(KeyboardInterrupt):
        run_plan(make_plan([Noting("noting", CASES, 3)], contenders("stem")), journal(tmp_path / "cut"), watching)
    assert len(journal(tmp_path / "cut").records) == 3
    run_plan(make_plan([rest], contenders("stem")), journal(tmp_path / "cut"), watching)
    assert len(rest.runs) == 1
    assert journal(tmp_path / "cut").records == journal(tmp_path / "whole").records
    run_plan(make_plan([again], contenders("stem")), journal(tmp_path / "cut"), watching)
    assert again.runs == []


def test_contender_that_cannot_be_built_at_a_length_is_left_out_there_alone(tmp_path: Path) -> None:
    measure = Noting("noting", [Case("short", 1024), Case("long", 65536)])
    plan = make_plan([measure], contenders("stem@0.1"))
    assert plan.left_out == [(1024, "stem@0.1")]
    assert [(case.key, one.name) for _, case, one in plan.tasks()] == [
        ("short", "dense"),
        ("long", "dense"),
        ("long", "stem@0.1"),
    ]


def test_parts_share_the_cases_and_every_case_keeps_all_its_contenders() -> None:
    measures = [Noting("one", [Case(str(n), 2048) for n in range(5)]), Noting("two", [Case(str(n), 4096) for n in range(4)])]
    whole = make_plan(measures, contenders("stem", "paper"))
    parts = [make_plan(measures, contenders("stem", "paper"), Part(index, 4)) for index in range(1, 5)]
    shares = [[(measure.name, case.key) for measure, case in part.cases()] for part in parts]
    assert shares[1] == [("one", "1"), ("two", "0")]
    assert [len(share) for share in shares] == [3, 2, 2, 2]
    assert sorted(case for share in shares for case in share) == [(measure.name, case.key) for measure, case in whole.cases()]
    assert all([one.name for *_, one in part.tasks()][:3] == ["dense", "stem", "paper"] for part in parts)
    assert sum(len(part.tasks()) for part in parts) == len(whole.tasks())
    assert all(part.reachable == whole.reachable for part in parts)


def test_directory_gains_the_cases_of_another_part(tmp_path: Path) -> None:
    for index in (2, 1, 2):
        run_plan(make_plan([Noting("noting", CASES)], contenders("stem"), Part(index, 2)), journal(tmp_path), watching)
    assert [record["case"] for record in journal(tmp_path).records] == ["b", "b", "a", "a"]


@pytest.mark.parametrize(("index", "count"), [(0, 8), (9, 8), (0, 0), (-1, 2)])
def test_part_that_is_none_is_refused(index: int, count: int) -> None:
    with pytest.raises(ValueError, match="part: expected I/N"):
        Part(index, count)


def test_measures_are_named_once() -> None:
    with pytest.raises(ValueError, match="measure: expected each name once"):
        make_plan([Noting("same", CASES), Noting("same", CASES)], [])
