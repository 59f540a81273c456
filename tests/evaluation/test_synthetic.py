"""Synthetic rows, against a solver that only reads them."""

from collections import Counter

import pytest
import torch

from stem_attention.evaluation.synthetic import ANSWER, TASKS, Marker, Recipe, Vocabulary, make_batch, make_prompt

SMALL = Vocabulary(keys=64, names=96, values=64, words=32, filler=64)
LOOKUPS = [Recipe("recall", 512, 0.3, 20), Recipe("variables", 512, 0.3, 20, 3), Recipe("hops", 512, 0.3, 20, 2)]


def items(ids: list[int], marker: Marker, width: int) -> list[tuple[int, ...]]:
    return [tuple(ids[at + 1 : at + 1 + width]) for at, token in enumerate(ids) if token == marker]


def solve(ids: list[int], vocabulary: Vocabulary) -> list[int]:
    """The answer to the question with which ``ids`` end; KeyError where it cannot be known yet."""
    at = max(place for place, token in enumerate(ids) if token in (Marker.ASK, Marker.VALUE, Marker.GOAL, Marker.TOP))
    question, asked, seen = ids[at], tuple(ids[at + 1 :]), ids[:at]
    if question == Marker.ASK:
        return list({item[:2]: item[2:] for item in items(seen, Marker.FACT, 5)}[asked])
    if question == Marker.TOP:
        return most_frequent(seen, vocabulary)
    statements = {item[0]: item[1:] for item in items(seen, Marker.SET if question == Marker.VALUE else Marker.EDGE, 4)}
    values = range(vocabulary.first("values"), vocabulary.first("words"))
    found = statements[asked[0]]
    while found[0] not in values:
        found = statements[found[0]]
    return list(found)


def most_frequent(seen: list[int], vocabulary: Vocabulary) -> list[int]:
    answered = {at + step for at, token in enumerate(seen) if token == Marker.TOP for step in range(1, 1 + ANSWER)}
    words = range(vocabulary.first("words"), vocabulary.first("filler"))
    ranking = Counter(token for at, token in enumerate(seen) if token in words and at not in answered).most_common(ANSWER + 1)
    assert len({count for _, count in ranking}) == ANSWER + 1, "the order is clear"
    return [word for word, _ in ranking[:ANSWER]]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [256, 1000, 9000])
def test_every_prompt_has_the_answer_that_a_solver_finds(task: str, length: int) -> None:
    vocabulary = Vocabulary()
    for seed in range(5):
        prompt = make_prompt(task, length, seed, vocabulary)
        assert len(prompt.ids) + len(prompt.answer) == length
        assert solve(prompt.ids, vocabulary) == prompt.answer
        assert all(0 < token < vocabulary.size for token in prompt.ids)


@pytest.mark.parametrize("recipe", [*LOOKUPS, Recipe("frequent", 512, 0.5, 8)], ids=lambda recipe: recipe.task)
def test_every_training_question_can_be_answered_from_what_stands_before_it(recipe: Recipe) -> None:
    batch = make_batch(recipe, SMALL, 4, torch.Generator().manual_seed(1))
    assert batch.ids.shape == (4, 512)
    assert batch.answers.shape == batch.depth.shape == (4, recipe.questions)
    assert (batch.answers[:, -1] == 512 - ANSWER).all(), "the last answer ends the row"
    asked = 0
    for ids, starts in zip(batch.ids.tolist(), batch.answers.tolist(), strict=True):
        for start in starts:
            if start >= 0:
                assert solve(ids[:start], SMALL) == ids[start : start + ANSWER]
                asked += 1
    assert asked > (4 if recipe.task == "frequent" else 79)


@pytest.mark.parametrize("recipe", LOOKUPS, ids=lambda recipe: recipe.task)
def test_depth_says_how_many_links_a_question_follows(recipe: Recipe) -> None:
    batch = make_batch(recipe, SMALL, 4, torch.Generator().manual_seed(1))
    assert set(batch.depth.flatten().tolist()) == set(range(recipe.links + 1))
    assert (batch.depth[:, -1] == recipe.links).all()


def test_variables_come_in_order_and_hops_do_not() -> None:
    def backwards(task: str, marker: Marker) -> int:
        ids = make_batch(Recipe(task, 512, 0.3, 1, 2), SMALL, 1, torch.Generator().manual_seed(0)).ids[0].tolist()
        statements = items(ids, marker, 2)
        place = {item[0]: at for at, item in enumerate(statements)}
        return sum(place.get(item[1], -1) > at for at, item in enumerate(statements))

    assert backwards("variables", Marker.SET) == 0
    assert backwards("hops", Marker.EDGE) > 0


def test_keys_have_rivals_that_share_either_half() -> None:
    keys = [item[:2] for item in items(make_prompt("recall", 8192, 0, Vocabulary()).ids, Marker.FACT, 5)]
    assert len(set(keys)) == len(keys) > 300
    for half in (0, 1):
        sharing = Counter(key[half] for key in keys)
        assert sum(sharing[key[half]] > 1 for key in keys) > 0.9 * len(keys)


@pytest.mark.parametrize("task", TASKS)
def test_prompts_depend_on_the_seed_alone(task: str) -> None:
    vocabulary = Vocabulary()
    assert make_prompt(task, 300, 7, vocabulary) == make_prompt(task, 300, 7, vocabulary)
    assert make_prompt(task, 300, 7, vocabulary).ids != make_prompt(task, 300, 8, vocabulary).ids


def test_filler_is_neither_constant_nor_even() -> None:
    vocabulary = Vocabulary()
    ids = make_prompt("hops", 8192, 0, vocabulary).ids
    counts = Counter(token for token in ids if token >= vocabulary.first("filler"))
    assert len(counts) > 200
    assert counts.most_common(1)[0][1] > 10 * sum(counts.values()) / vocabulary.filler


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="task"):
        make_prompt("sums", 300, 0, SMALL)
    with pytest.raises(ValueError, match="length"):
        make_prompt("frequent", 30, 0, SMALL)
    with pytest.raises(ValueError, match="length"):
        make_batch(Recipe("recall", 100, 0.5, 20), SMALL, 1, torch.Generator())
    with pytest.raises(ValueError, match="keys"):
        make_prompt("recall", 100_000, 0, SMALL)
    with pytest.raises(ValueError, match="names"):
        make_batch(Recipe("hops", 300, 0.2, 1, 2), Vocabulary(names=5), 1, torch.Generator())


@pytest.mark.parametrize("task", ["variables", "hops"])
def test_worked_links_are_followed_by_the_value_where_it_is_known(task: str) -> None:
    recipe = Recipe(task, 512, 0.3, questions=5, links=2, worked=0.5)
    batch = make_batch(recipe, SMALL, 4, torch.Generator().manual_seed(0))
    worked = batch.answers[:, :-5]
    assert worked.shape[1] > 10
    assert (worked >= 0).all() == (task == "variables")
    question = Marker.VALUE if task == "variables" else Marker.GOAL
    for ids, starts, depths in zip(batch.ids.tolist(), worked.tolist(), batch.depth.tolist(), strict=True):
        for start, depth in zip(starts, depths, strict=False):
            assert depth in (0, 1)
            if start >= 0:
                assert solve([*ids[: start - 3], question, ids[start - 1]], SMALL) == ids[start : start + ANSWER]
