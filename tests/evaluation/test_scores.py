"""Who is best at equal density: groups, pairs and what counts as clear."""

import pytest

from stem_attention.evaluation.scores import METRICS, columns, verdicts

SHARES = {"dense": 1.0, "stem": 0.30, "uniform": 0.31, "window": 0.29, "oracle": 0.50}


def needle(contender: str, case: int, share: float, tokens: int = 1024, kind: str = "single") -> dict:
    return {
        "measure": "needle", "case": f"{kind}-{tokens}-{case}", "tokens": tokens, "contender": contender, "kind": kind,
        "share": share, "density": SHARES[contender],
    }  # fmt: skip


def records(found: dict[str, list[float]]) -> list[dict]:
    return [needle(name, case, share) for name, shares in found.items() for case, share in enumerate(shares)]


def test_columns_are_apart_by_length_and_group() -> None:
    some = [needle("stem", 0, 1.0, 2048), needle("stem", 0, 1.0), needle("stem", 0, 0.5, kind="multikey")]
    found = columns([*some, {**needle("stem", 0, 1.0), "measure": "unheard of"}])
    assert [(column.tokens, column.title) for column in found] == [
        (1024, "needles found, single"),
        (1024, "needles found, multikey"),
        (2048, "needles found, single"),
    ]


def test_best_of_equal_density_is_compared_with_stem_case_by_case() -> None:
    (column,) = columns(records({"dense": [1] * 20, "stem": [0] * 20, "uniform": [1] * 20, "oracle": [1] * 20}))
    (verdict,) = verdicts(column, ["stem"])
    assert (verdict.pivot, verdict.members, verdict.rival) == ("stem", ("uniform", "stem"), "stem")
    assert verdict.lead.mean == 1.0
    assert verdict.is_clear


def test_stem_in_front_is_compared_with_the_second_and_a_tie_is_its_own() -> None:
    (column,) = columns(records({"stem": [1, 1, 0, 1], "window": [1, 0, 0, 0], "uniform": [1, 1, 1, 0]}))
    (verdict,) = verdicts(column, ["stem"])
    assert (verdict.members[0], verdict.rival) == ("stem", "uniform")
    assert verdict.lead.mean == 0
    assert not verdict.is_clear


def test_where_less_is_better_the_least_wins() -> None:
    def loss(contender: str, case: int, value: float) -> dict:
        about = {"measure": "perplexity", "case": str(case), "tokens": 1024, "contender": contender, "text": "t"}
        return {**about, "loss": value, "dense_loss": 2.0, "density": SHARES[contender]}

    some = [loss(name, case, 2 + case / 100 + extra) for name, extra in (("stem", 0.1), ("uniform", 0.3)) for case in range(4)]
    (column,) = columns(some)
    (verdict,) = verdicts(column, ["stem"])
    assert verdict.members == ("stem", "uniform")
    assert verdict.lead.mean == pytest.approx(-0.2)
    assert verdict.is_clear
    assert column.metric.show(verdict.lead.mean + 0.2) == "1.0000"


def test_only_cases_that_all_have_run_count() -> None:
    (column,) = columns([*records({"stem": [1, 0], "uniform": [1]}), needle("uniform", 7, 0)])
    (verdict,) = verdicts(column, ["stem"])
    assert verdict.lead.count == 1


def test_densities_further_apart_are_not_compared() -> None:
    (column,) = columns(records({"dense": [1], "stem": [1], "oracle": [1]}))
    assert verdicts(column, ["stem"]) == []
    (column,) = columns(records({"window": [1], "uniform": [1], "stem": [1]}))
    (verdict,) = verdicts(column, ["stem"])
    assert verdict.pivot == "stem"
    assert set(verdict.members) == {"window", "uniform", "stem"}


def test_oracle_bounds_and_does_not_compete() -> None:
    (column,) = columns(records({"stem": [0, 1], "uniform": [1, 1], "window": [0, 0]}))
    (verdict,) = verdicts(column, ["stem"], bounds=["uniform"])
    assert verdict.members == ("stem", "window")


def test_a_record_of_many_prompts_gives_a_value_each() -> None:
    record = {"measure": "ruler", "case": "vt-1024", "tokens": 1024, "contender": "stem", "density": 0.3, "task": "vt"}
    (column,) = columns([{**record, "sample_scores": [1.0, 0.0, 0.5]}])
    assert (column.estimate("stem").mean, column.estimate("stem").count) == (0.5, 3)
    assert column.title == METRICS["ruler"].label
