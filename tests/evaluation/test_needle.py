"""The needle measure: its prompts, its verdict and its interval."""

import math

import pytest
import torch

from stem_attention import StemConfig
from stem_attention.evaluation.models import take_stem
from stem_attention.evaluation.needle import NeedleCase, first_number, needle_cases, try_needle, wilson_interval
from stem_attention.evaluation.prompts import Prompt

SPARSE = StemConfig(block_size=64, ratio_short=0.1, min_blocks=1, dense_below=0)


def test_cases_cover_every_depth_and_differ_in_text_and_number(tokenizer) -> None:
    cases = needle_cases(tokenizer, 1000, [0.0, 0.5, 1.0], 2, first_seed=5)
    assert [case.depth for case in cases] == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
    assert [case.seed for case in cases] == [5, 6, 7, 8, 9, 10]
    assert len({case.prompt.answer for case in cases}) == 6
    assert all(len(case.prompt.ids) <= 1000 for case in cases)
    with pytest.raises(ValueError, match="per_depth"):
        needle_cases(tokenizer, 1000, [0.5], 0)


def test_trial_reports_what_happened(model, tokenizer) -> None:
    take_stem(model)
    (case,) = needle_cases(tokenizer, 1200, [0.5], 1)
    layers: list[int] = []
    trial = try_needle(model, tokenizer, case, SPARSE, max_new_tokens=4, on_attention=lambda call: layers.append(call.layer))
    assert not trial.found, "a random model cannot find the number"
    assert (trial.planted, trial.tokens) == (case.prompt.answer, len(case.prompt.ids))
    assert 0 < trial.density < 1
    assert layers == [0, 1], "decoding is not watched"
    assert try_needle(model, tokenizer, case, None, max_new_tokens=1).density == 1.0


@pytest.mark.parametrize(("planted", "found"), [("111", True), ("112", False), ("11", False)])
def test_verdict_follows_the_answer(model, tokenizer, planted: str, found: bool) -> None:
    head = torch.nn.Linear(32, 257)  # with this head the model says 1, whatever it reads
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    with torch.no_grad():
        head.bias[tokenizer("1").input_ids[0]] = 1.0
    model.lm_head = head
    take_stem(model)
    case = NeedleCase(0.5, 0, Prompt(tokenizer("x" * 100).input_ids, planted, "is"))
    trial = try_needle(model, tokenizer, case, SPARSE, max_new_tokens=3)
    assert trial.answer == "111"
    assert trial.found is found


def test_prompt_that_hides_nothing_is_refused(model, tokenizer) -> None:
    with pytest.raises(ValueError, match="planted number"):
        try_needle(model, tokenizer, NeedleCase(0.5, 0, Prompt([1, 2, 3])), None)


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("1234567.", "1234567"),
        (": 1234567. The other is 7654321", "1234567"),
        ("1,234,567", "1234567"),
        ("12345678", "12345678"),
        ("1,2345", "1"),
        ("not mentioned", None),
    ],
)
def test_answer_is_its_first_number(answer: str, number: str | None) -> None:
    assert first_number(answer) == number


@pytest.mark.parametrize(("hits", "trials"), [(0, 6), (1, 6), (3, 6), (6, 6), (8, 10), (90, 100)])
def test_wilson_interval_ends_where_the_score_test_rejects(hits: int, trials: int) -> None:
    low, high = wilson_interval(hits, trials)
    assert 0 <= low <= hits / trials <= high <= 1
    for end in {low, high} - {0.0, 1.0}:
        assert abs(hits / trials - end) / math.sqrt(end * (1 - end) / trials) == pytest.approx(1.959964, rel=1e-6)
    assert high - low < 1


def test_wilson_interval_needs_trials_and_no_more_hits_than_those() -> None:
    with pytest.raises(ValueError, match="trials"):
        wilson_interval(0, 0)
    with pytest.raises(ValueError, match="hits"):
        wilson_interval(3, 2)
