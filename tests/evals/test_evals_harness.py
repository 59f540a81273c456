"""RULER and LongBench through lm-eval, on a tiny random model and a tokenizer with one token per byte."""

import json
import random

import pytest

from stem_attention import UnsupportedError
from stem_attention.policies import Stem
from stem_evals.harness import OFFLINE, Harness

from .records import through_json

SPARSE = Stem(block_size=32, ratio_short=0.3, sink_blocks=1, local_blocks=1, tail_blocks=1)


@pytest.fixture
def longbench_data(tmp_path):
    """A data set in the shape of the hub's, with a short prompt and one that does not fit 2048 tokens."""
    folder = tmp_path / "LongBench"
    (folder / "2wikimqa").mkdir(parents=True)
    about = {"question": "Where is Paris?", "answers": ["France"]}
    docs = [json.dumps({"context": "Paris is in France. " * repeats, **about}) for repeats in (5, 200)]
    (folder / "2wikimqa" / "test.jsonl").write_text("\n".join(docs))
    names = "configs:\n- config_name: 2wikimqa\n  data_files:\n  - split: test\n    path: 2wikimqa/test.jsonl\n"
    (folder / "README.md").write_text(f"---\n{names}---\n")
    return folder


def ruler(model, tokenizer, *tasks, **options):
    return Harness("ruler", model, tokenizer, [4096], 2, tasks, **options)


def run(measure, policy):
    (case,) = measure.cases()
    return measure.run(case, policy)


def prompts(tokenizer, task, **options):
    """What lm-eval is given to read."""
    measure = ruler(None, tokenizer, task, **options)
    return [dict(doc) for doc in measure._load(task, 4096).dataset["test"]]


def test_dense_and_sparse_read_the_same_prompts_and_only_sparse_is_sparse(model, tokenizer, capfd):
    measure = ruler(model, tokenizer, "niah_single_1")
    seen = []
    model.register_forward_pre_hook(lambda _, args, options: seen.append(options["input_ids"].shape[1]), with_kwargs=True)
    dense, sparse = run(measure, None), run(measure, SPARSE)
    sizes = [size for size in seen if size > 1]
    assert len(sizes) == 4
    assert sizes[:2] == sizes[2:]
    assert 2000 < max(sizes) <= 4096 - 128
    assert (dense["density"], dense["sparse_share"]) == (1, 0)
    assert 0 < sparse["density"] < 0.7 < sparse["sparse_share"] == 1
    assert dense["docs"] == sparse["docs"]
    for record in (dense, sparse):
        assert len(record["sample_scores"]) == len(set(record["docs"])) == record["n"] == 2
        assert record["score"] == sum(record["sample_scores"]) / 2
    assert through_json([dense, sparse]) == [dense, sparse]
    assert capfd.readouterr() == ("", "")
    assert tokenizer.pad_token is None


def test_the_same_seed_makes_the_same_prompts_whatever_was_made_before(tokenizer):
    first = prompts(tokenizer, "ruler_cwe")
    assert len(first) == 500
    random.random()
    assert prompts(tokenizer, "ruler_cwe") == first
    assert prompts(tokenizer, "ruler_cwe", seed=1) != first


def test_tasks_without_data_are_the_usual_ones(model, tokenizer):
    measure = Harness("ruler", model, tokenizer, [4096, 8192], 1)
    assert [case.key for case in measure.cases()] == [f"{task}-{tokens}" for tokens in (4096, 8192) for task in OFFLINE]


def test_longbench_from_a_folder_cuts_what_is_too_long(model, tokenizer, longbench_data):
    measure = Harness("longbench", model, tokenizer, [2048], 5, ["longbench_2wikimqa"], longbench_data)
    seen = []
    model.register_forward_pre_hook(lambda _, args, options: seen.append(options["input_ids"].shape[1]), with_kwargs=True)
    record = run(measure, SPARSE)
    assert record["n"] == 2
    assert max(seen) == 2048 - 32
    assert record["score"] == sum(record["sample_scores"]) / 2
    assert record["density"] < 1


def test_longbench_without_its_data_stops_before_anything_runs(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="tasks: expected among longbench_2wikimqa"):
        Harness("longbench", model, tokenizer, [2048], 5, ["narrativeqa"])
    with pytest.raises(UnsupportedError, match="longbench_trec: lm-eval could not make its prompts"):
        Harness("longbench", model, tokenizer, [2048], 5, ["longbench_trec"], tmp_path)
