"""Scores: their intervals, against the definitions and where small samples tempt, and who is best at equal density."""

import math

import pytest

from stem_evals.intervals import mean_interval, share_difference_interval, share_interval
from stem_evals.scores import best_table, columns, score_table

from .records import FAMILIES, needle, perplexity


def records(found):
    return [needle(name, case, share) for name, shares in found.items() for case, share in enumerate(shares)]


def best(some, families=FAMILIES):
    """Rows of the table of the best at equal density."""
    return best_table(columns(some), families).to_dict("records")


def test_columns_are_apart_by_length_and_group():
    some = [needle("stem", 0, 1.0, 2048), needle("stem", 0, 1.0), needle("stem", 0, 0.5, kind="multikey")]
    found = columns([*some, {**needle("stem", 0, 1.0), "measure": "unheard of"}])
    assert [(column.tokens, column.title) for column in found] == [
        (1024, "numbers found, single"),
        (1024, "numbers found, multikey"),
        (2048, "numbers found, single"),
    ]


@pytest.mark.parametrize(
    ("found", "expected", "lead"),
    [
        ({"dense": [1] * 9, "stem": [0] * 9, "uniform": [1] * 9, "oracle": [1] * 9}, ("uniform", "stem", "clear"), "+100.0"),
        # Stem in front is compared with the second, and a tie is its own.
        ({"uniform": [1, 1, 1, 0], "window": [1, 0, 0, 0], "stem": [1, 1, 0, 1]}, ("stem", "uniform", "within noise"), "+0.0"),
        # 0.29 and 0.31 are of one group by stem's 0.30.
        ({"window": [1], "uniform": [0], "stem": [0]}, ("window", "stem", "one sample"), "+100.0"),
    ],
)
def test_best_of_equal_density_is_compared_with_stem_case_by_case(found, expected, lead):
    (row,) = best(records(found))
    assert (row["density"], row["best"], row["compared with"], row["verdict"]) == ("0.300", *expected)
    assert row["lead"].startswith(lead)


def test_where_less_is_better_the_least_wins():
    some = [
        perplexity(name, case, 2 + case / 100 + extra) for name, extra in (("stem", 0.1), ("uniform", 0.3)) for case in range(4)
    ]
    (row,) = best(some)
    assert (row["best"], row["compared with"], row["verdict"]) == ("stem", "uniform", "clear")
    assert row["lead"].startswith("-18.13 [")  # per cent: exp(-0.2)


def test_only_cases_that_all_have_run_count():
    (row,) = best([*records({"stem": [1, 0], "uniform": [1]}), needle("uniform", 7, 0)])
    assert row["n"] == "1"


def test_densities_further_apart_are_not_compared():
    assert best(records({"dense": [1], "stem": [1], "wide": [1]})) == []


def test_oracle_bounds_and_does_not_compete():
    (row,) = best(records({"stem": [0, 1], "uniform": [1, 1], "window": [0, 0]}), {**FAMILIES, "uniform": "oracle"})
    assert (row["best"], row["compared with"]) == ("stem", "window")


def test_a_record_of_many_prompts_gives_a_value_each():
    record = {"measure": "ruler", "case": "vt-1024", "tokens": 1024, "contender": "stem", "density": 0.3, "task": "vt"}
    (column,) = columns([{**record, "sample_scores": [1.0, 0.0, 0.5]}])
    assert (column.estimate("stem").mean, column.estimate("stem").count) == (0.5, 3)
    assert column.title == "RULER, vt"


def test_prompts_of_lm_eval_are_pairs_by_their_hashes_and_tasks_come_together_too():
    about = {"measure": "ruler", "tokens": 1024, "density": 1.0}
    some = [
        {**about, "case": f"{task}-1024", "task": task, "contender": name, "sample_scores": scores, "docs": docs}
        for task in ("vt", "cwe")
        for name, scores, docs in (("dense", [1.0, 0.0], ["a", "b"]), ("stem", [0.0, 0.5, 1.0], ["c", "b", "a"]))
    ]
    found = columns(some)
    assert [column.title for column in found] == ["RULER, vt", "RULER, cwe", "RULER, all tasks"]
    lead = found[2].difference("stem", "dense")
    assert (lead.mean, lead.count) == (0.25, 4)


def test_the_table_says_what_ran_and_compares_only_what_left_something_out():
    some = records({"dense": [1, 1], "stem": [0, 1], "all": [1, 1]})
    for record in some:
        record["sparse_share"] = {"dense": 0.0, "stem": 0.5, "all": 1.0}[record["contender"]]
    (column,) = columns(some)
    rows = score_table([column], {}).set_index("contender")
    assert rows["ran"].to_dict() == {"dense": "dense", "stem": "sparse in 50% of the layers", "all": "kept everything"}
    assert rows["minus dense"]["stem"].startswith("-50.0 [")
    assert rows["minus dense"]["all"] == rows["minus dense"]["dense"] == ""
    assert column.sparse == ["stem"]
    assert best(some) == []
    timed = score_table([column], {(1024, "stem"): "0.300"})
    assert timed.set_index("contender")["time over dense"].to_dict() == {"dense": "", "stem": "0.300", "all": ""}


@pytest.mark.parametrize(("hits", "trials"), [(0, 6), (1, 6), (3, 6), (6, 6), (8, 10), (90, 100), (198, 199)])
def test_the_interval_of_a_share_is_wilsons(hits, trials):
    found = share_interval([1.0] * hits + [0.0] * (trials - hits))
    assert 0 <= found.low <= found.mean <= found.high <= 1
    assert found.mean == pytest.approx(hits / trials)
    for end in {found.low, found.high} - {0.0, 1.0, found.mean}:
        assert abs(found.mean - end) / math.sqrt(end * (1 - end) / trials) == pytest.approx(1.959964, rel=1e-6)


def test_the_interval_of_a_mean_is_students():
    found = mean_interval([1.0, 2.0, 3.0, 4.0])
    half = 3.182446 * math.sqrt(5 / 3) / 2
    assert (found.mean, found.count) == (2.5, 4)
    assert (found.low, found.high) == pytest.approx((2.5 - half, 2.5 + half), rel=1e-6)
    assert found.excludes_zero
    assert mean_interval([0.25, 0.25]).text("{:.2f}".format) == "0.25 [0.25, 0.25]"


def test_one_value_has_a_mean_and_no_interval():
    found = mean_interval([7.0])
    assert math.isnan(found.low)
    assert not found.excludes_zero
    assert found.text("{:.1f}".format) == "7.0"


@pytest.mark.parametrize("interval", [mean_interval, share_interval, share_difference_interval])
def test_no_values_are_refused(interval):
    with pytest.raises(ValueError, match="values: expected at least one"):
        interval([])


def test_two_prompts_do_not_prove_a_difference_and_twenty_do():
    assert not share_difference_interval([1.0, 1.0]).excludes_zero
    assert share_difference_interval([1.0] * 20).excludes_zero
    assert not share_difference_interval([1.0, -1.0] * 10).excludes_zero
    nothing = share_difference_interval([0.0] * 10)
    assert nothing.low < 0 < nothing.high


def test_the_interval_of_a_paired_difference_is_bonett_and_prices():
    found = share_difference_interval([1.0] * 6 + [-1.0] * 2 + [0.0] * 12)
    gain, loss = 7 / 22, 3 / 22
    half = 1.959964 * math.sqrt((gain + loss - (gain - loss) ** 2) / 22)
    assert found.mean == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((gain - loss - half, gain - loss + half), rel=1e-6)
