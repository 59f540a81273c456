"""The needle measure: its grid, its verdict, and when it stops listening."""

from itertools import cycle, product

import pytest
import torch

from stem_attention.models.load import take_stem
from stem_attention.models.prompts import KINDS, Prompt
from stem_attention.models.texts import Text
from stem_attention.policies import Stem
from stem_evals.needle import Needle, complete_numbers, numbers, try_prompt

SPARSE = Stem(block_size=64, ratio_short=0.1, min_blocks=1)


def says(model, tokenizer, text):
    """Make a model that answers with this text again and again, a token each time, whatever it reads."""
    spoken = cycle(tokenizer(text).input_ids)

    class Head(torch.nn.Module):
        def forward(self, hidden):
            return torch.nn.functional.one_hot(torch.tensor(next(spoken)), 257).float().expand(*hidden.shape[:-1], 257)

    model.lm_head = Head()
    take_stem(model)


def grid(model, tokenizer, **changes):
    options = {"kinds": KINDS, "lengths": [1800, 2000], "depths": [0.0, 0.5], "samples": 2}
    return Needle(model, tokenizer, **{**options, **changes})


def test_grid_covers_everything_by_stable_names(model, tokenizer):
    keys = [case.key for case in grid(model, tokenizer).cases()]
    assert len(keys) == len(set(keys)) == 4 * 2 * 2 * 2
    assert keys[0] == "single-1800-0-0"
    assert set(keys) < {case.key for case in grid(model, tokenizer, samples=3, depths=[0.0, 0.25, 0.5]).cases()}
    first = grid(model, tokenizer).cases()[: 4 * 2]
    assert {(case.about["kind"], case.about["depth"]) for case in first} == {*product(KINDS, (0, 0.5))}


def test_no_two_cases_ask_for_the_same_and_the_seed_changes_all(model, tokenizer):
    def planted(seed):
        measure = grid(model, tokenizer, kinds=["single"], lengths=[900], seed=seed)
        says(model, tokenizer, "1 ")
        return [tuple(measure.run(case, None)["planted"]) for case in measure.cases()]

    assert len(set(planted(0))) == 4
    assert planted(0) == planted(0)
    assert not set(planted(0)) & set(planted(1))


@pytest.mark.parametrize("kind", KINDS)
def test_record_says_what_happened(model, tokenizer, kind):
    says(model, tokenizer, "7 ")
    measure = grid(model, tokenizer, kinds=[kind], lengths=[2000], depths=[0.5], samples=1)
    (case,) = measure.cases()
    record = measure.run(case, SPARSE)
    asked = 4 if kind in ("multivalue", "multiquery") else 1
    assert len(record["planted"]) == len(record["hits"]) == len(record["places"]) == asked
    assert (record["found"], record["share"]) == (False, 0.0)
    assert 1500 < record["prompt_tokens"] <= 2000 - 24 * asked
    assert 0 < record["density"] < record["sparse_share"] == 1
    dense = measure.run(case, None)
    assert (dense["density"], dense["sparse_share"]) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("answer", "hits"),
    [
        ("111, 222.", (True, True)),
        ("222 and 111.", (True, True)),
        ("111 and 111 and 222.", (True, False)),  # only as many numbers count as were asked for
        ("1112 and 222.", (False, True)),
        ("none of them", (False, False)),
    ],
)
def test_hits_are_the_numbers_among_the_first_of_the_answer(model, tokenizer, answer, hits):
    says(model, tokenizer, answer + " ")
    prompt = Prompt(tokenizer("x" * 100).input_ids, ("111", "222"), "are", (0.0, 0.5))
    trial = try_prompt(model, tokenizer, prompt, SPARSE)
    assert (trial["hits"], trial["found"], trial["share"]) == (list(hits), all(hits), sum(hits) / 2)


def test_listening_ends_when_the_numbers_are_complete(model, tokenizer):
    says(model, tokenizer, " 12345. And 678, and so on")
    prompt = Prompt(tokenizer("x" * 100).input_ids, ("12345",), "is", (0.5,))
    assert try_prompt(model, tokenizer, prompt, None)["answer"] == "12345."


def test_haystack_may_be_a_text(model, tokenizer):
    says(model, tokenizer, "7 ")
    haystack = Text("sea.txt", "Call me whoever you like. The sea was grey. " * 5)
    plain, other = (
        grid(model, tokenizer, kinds=["single"], lengths=[1500], depths=[0.5], samples=1, haystack=text)
        for text in (None, haystack)
    )
    assert plain.run(plain.cases()[0], None)["planted"] == other.run(other.cases()[0], None)["planted"]
    assert other.settings["haystack"] == {"name": "sea.txt", "sha256": haystack.sha256}


def test_what_cannot_be_asked_is_refused_before_anything_runs(model, tokenizer):
    with pytest.raises(ValueError, match="planted numbers"):
        try_prompt(model, tokenizer, Prompt([1, 2, 3]), None)
    with pytest.raises(ValueError, match="count"):
        grid(model, tokenizer, count=65)


@pytest.mark.parametrize(
    ("answer", "found", "complete"),
    [
        ("1234567", ["1234567"], 0),
        ("1234567,", ["1234567"], 0),
        ("1234567, ", ["1234567"], 1),
        (": 1234567. The other is 7654321", ["1234567", "7654321"], 1),
        ("1,234,567", ["1234567"], 0),
        ("1,234,567 ", ["1234567"], 1),
        ("12345678", ["12345678"], 0),
        ("1,2345 ", ["1", "2345"], 1),
        ("1. 1234567\n2. 7654321\n3) 11", ["1234567", "7654321", "11"], 2),
        ("10.", [], 0),
    ],
)
def test_numbers_of_an_answer_and_those_that_nothing_can_change(answer, found, complete):
    assert numbers(answer) == found
    assert complete_numbers(answer) == complete
    assert numbers(answer + "000 9")[:complete] == found[:complete]
