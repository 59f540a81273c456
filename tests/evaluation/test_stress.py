"""The stress measure: its prompts, its verdict, its files and its part of the report."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stem_attention import StemConfig
from stem_attention.evaluation.models import find_model, load_model, take_stem
from stem_attention.evaluation.stress import LAYOUT, Stress, read_vocabulary, save_vocabulary, section
from stem_attention.evaluation.synthetic import ANSWER, TASKS, Vocabulary, make_prompt

SMALL = Vocabulary(keys=64, names=96, values=1, words=32, filler=64)
SPARSE = StemConfig(block_size=64, ratio_short=0.1, min_blocks=1, dense_below=0)


@pytest.fixture
def stress_model() -> LlamaForCausalLM:
    """A random model that answers every question with the vocabulary's only value."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=SMALL.size, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    head = torch.nn.Linear(32, SMALL.size)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    with torch.no_grad():
        head.bias[SMALL.first("values")] = 1.0
    model.lm_head = head
    take_stem(model)
    return model


def test_cases_cover_tasks_lengths_and_seeds(stress_model) -> None:
    measure = Stress(stress_model, SMALL, list(TASKS), [256, 512], samples=3, seed=5)
    cases = measure.cases()
    assert len({case.key for case in cases}) == len(cases) == 4 * 2 * 3
    assert {case.tokens for case in cases} == {256, 512}
    assert {case.about["sample"] for case in cases} == {5, 6, 7}
    assert [case.about["task"] for case in cases[:4]] == list(TASKS)


@pytest.mark.parametrize("what", [None, SPARSE], ids=["dense", "sparse"])
def test_answer_is_right_when_every_token_is(stress_model, what: StemConfig | None) -> None:
    measure = Stress(stress_model, SMALL, ["recall", "frequent"], [700], samples=1)
    layers: list[int] = []
    recall, frequent = (measure.run(case, what, lambda call: layers.append(call.layer)) for case in measure.cases())
    assert recall["found"] is True
    assert recall["answer"] == recall["wanted"] == [SMALL.first("values")] * ANSWER
    assert frequent["found"] is False
    assert recall["prompt_tokens"] == 700 - ANSWER
    assert recall["density"] == 1 if what is None else 0 < recall["density"] < 1
    assert layers == [0, 1, 0, 1], "decoding is not watched"
    json.dumps([recall, frequent])


def test_settings_that_cannot_be_run_are_refused(stress_model) -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        Stress(stress_model, Vocabulary(), ["recall"], [256])
    with pytest.raises(ValueError, match="samples"):
        Stress(stress_model, SMALL, ["recall"], [256], samples=0)
    with pytest.raises(ValueError, match="task"):
        Stress(stress_model, SMALL, ["sums"], [256])
    with pytest.raises(ValueError, match="length"):
        Stress(stress_model, SMALL, ["recall"], [4096, 10])


def test_files_beside_the_model_bring_back_vocabulary_and_spelling(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=SMALL.size, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    save_vocabulary(tmp_path, SMALL, {"steps": 3})
    assert read_vocabulary(tmp_path) == SMALL
    assert json.loads((tmp_path / LAYOUT).read_text())["steps"] == 3
    model, tokenizer = load_model(find_model(str(tmp_path)), torch.device("cpu"), torch.float32)
    prompt = make_prompt("hops", 300, 0, SMALL)
    text = tokenizer.decode(prompt.ids)
    assert text.startswith("BEGIN ")
    assert "GOAL name" in text
    assert tokenizer(text).input_ids == prompt.ids
    assert Stress(model, SMALL, ["recall"], [256]).cases()


def test_directory_without_the_layout_or_with_another_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_stress"):
        read_vocabulary(tmp_path)
    save_vocabulary(tmp_path, SMALL, {})
    (tmp_path / LAYOUT).write_text((tmp_path / LAYOUT).read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="format"):
        read_vocabulary(tmp_path)


def test_section_counts_right_answers_and_compares_with_dense() -> None:
    records = [
        {"task": "recall", "tokens": 256, "contender": name, "case": f"recall-256-{sample}", "sample": sample,
         "found": sample < right, "density": density, "seconds": 0.5}
        for name, right, density in (("dense", 8, 1.0), ("stem", 6, 0.25))
        for sample in range(10)
    ]  # fmt: skip
    part = section(records)
    dense, stem = part.tables[0].rows
    assert dense[:5] == ("recall", "256", "dense", "1.000", "8 of 10")
    assert stem[2:5] == ("stem", "0.250", "6 of 10")
    assert stem[5].startswith("60% [31%, 83%]")
    assert dense[6] == ""
    assert stem[6].startswith("-20.0 [")
    ((stem_of_file, figure),) = part.figures
    assert stem_of_file == "stress"
    assert [axes.get_title() for axes in figure.axes] == ["recall"]


def test_section_draws_bars_where_every_answer_is_right() -> None:
    records = [
        {"task": "recall", "tokens": 256, "contender": "dense", "case": f"recall-256-{sample}", "sample": sample,
         "found": True, "density": 1.0, "seconds": 0.5}
        for sample in range(30)
    ]  # fmt: skip
    part = section(records)
    assert part.tables[0].rows[0][4] == "30 of 30"
    assert len(part.figures) == 1
