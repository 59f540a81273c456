"""The runner: its order, its parts, and what it leaves out."""

import pytest

from stem_evals.contender import parse_contender
from stem_evals.journal import open_journal, read_journal
from stem_evals.measure import Case
from stem_evals.runner import make_plan, run_plan

from .records import HEADER


class Noting:
    """A measure that notes what it is asked to run."""

    def __init__(self, name, cases):
        self.name, self.settings, self._cases = name, {}, cases
        self.runs: list[tuple[str, object]] = []
        self.record: dict[str, object] = {}

    def cases(self):
        return self._cases

    def run(self, case, policy):
        self.runs.append((case.key, policy))
        return {"density": 1.0, "seconds": 0.0, **self.record}


CASES = [Case("a", 2048, {"depth": 0.5}), Case("b", 4096)]


def contenders(*specs):
    return [parse_contender(spec) for spec in specs]


def test_every_contender_runs_a_case_before_the_next_and_dense_runs_first(tmp_path):
    measure = Noting("noting", CASES)
    plan = make_plan([measure], contenders("stem", "dense", "paper", "stem"))  # each once
    names = list(run_plan(plan, open_journal(tmp_path, HEADER)))
    assert names[:2] == ["noting a, dense", "noting a, stem"]
    assert [case for case, _ in measure.runs] == ["a"] * 3 + ["b"] * 3
    assert [policy is None for _, policy in measure.runs] == [True, False, False] * 2
    assert read_journal(tmp_path).records[1] == {
        "measure": "noting", "case": "a", "tokens": 2048, "contender": "stem", "depth": 0.5, "density": 1.0, "seconds": 0.0,
    }  # fmt: skip


def test_contender_that_cannot_be_built_at_a_length_is_left_out_there_alone(tmp_path):
    measure = Noting("noting", [Case("short", 1024), Case("long", 65536)])
    plan = make_plan([measure], contenders("stem@0.1"))
    assert plan.left_out == [(1024, "stem@0.1")]
    tasks = [(case.key, one.name) for _, case, one in plan.tasks()]
    assert tasks == [("short", "dense"), ("long", "dense"), ("long", "stem@0.1")]


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


def test_measures_are_named_once():
    with pytest.raises(ValueError, match="measure: expected each name once"):
        make_plan([Noting("same", CASES), Noting("same", CASES)], [])


@pytest.mark.parametrize("bad", [{"loss": float("nan")}, {"buckets": [{"kl": float("inf")}]}])
def test_a_record_that_json_cannot_hold_ends_the_run_in_words_and_is_not_kept(tmp_path, bad):
    measure = Noting("noting", CASES)
    measure.record = bad
    with pytest.raises(ValueError, match="noting a, dense: record: expected finite numbers, got NaN or infinity"):
        list(run_plan(make_plan([measure], contenders("stem")), open_journal(tmp_path, HEADER)))
    assert read_journal(tmp_path).records == []
