"""Who is best at equal density: groups, pairs and what counts as clear."""

from stem_evals.scores import best_table, columns, score_table

from .records import FAMILIES, needle, perplexity


def records(found: dict[str, list[float]]) -> list[dict]:
    return [needle(name, case, share) for name, shares in found.items() for case, share in enumerate(shares)]


def best(some: list[dict], families: dict[str, str] = FAMILIES) -> list[dict]:
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


def test_best_of_equal_density_is_compared_with_stem_case_by_case():
    (row,) = best(records({"dense": [1] * 20, "stem": [0] * 20, "uniform": [1] * 20, "oracle": [1] * 20}))
    assert (row["density"], row["best"], row["compared with"]) == ("0.300", "uniform", "stem")
    assert row["lead"].startswith("+100.0 [")
    assert row["verdict"] == "clear"


def test_stem_in_front_is_compared_with_the_second_and_a_tie_is_its_own():
    (row,) = best(records({"stem": [1, 1, 0, 1], "window": [1, 0, 0, 0], "uniform": [1, 1, 1, 0]}))
    assert (row["best"], row["compared with"]) == ("stem", "uniform")
    assert row["lead"].startswith("+0.0 [")
    assert row["verdict"] == "within noise"


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
    (row,) = best(records({"window": [1], "uniform": [0], "stem": [0]}))  # 0.29 and 0.31 are of one group by stem's 0.30
    assert (row["density"], row["best"], row["compared with"]) == ("0.300", "window", "stem")


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
