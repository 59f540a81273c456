"""The recipes of docs/transformers.md: transformers' own pipeline, and lm-eval's own command."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from tests.toys import VOCABULARY, save

from stem_attention.policies import SinkWindow

from .tiny import hosts, small_llama, transformers

POLICY = SinkWindow(sink_blocks=1, window_blocks=2, block_size=16)
WORDS = [f"w{i}" for i in range(90)]
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "transformers.md").read_text()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny model as it is downloaded: weights, a tokenizer, and a stored policy."""
    model = small_llama(vocab_size=VOCABULARY, eos_token_id=0)
    hosts.set_policy(model, POLICY, dense_below=0)
    return save(model, tmp_path_factory.mktemp("model"))


def sparse_calls(run):
    """Calls that kept what the stored policy keeps."""
    calls = []
    with hosts.use_policy(observer=calls.append):
        run()
    densities = {(call.kv_len, call.density) for call in calls if call.sparse}
    assert all(density == pytest.approx(POLICY.density(tokens)) for tokens, density in densities)
    return sum(call.sparse for call in calls)


def test_a_pipeline(directory):
    assert 'model_kwargs={"attn_implementation": "stem"}' in PAGE
    pipe = transformers.pipeline("text-generation", model=str(directory), model_kwargs={"attn_implementation": "stem"})
    prompt = " ".join(WORDS * 2)
    answers = []
    assert sparse_calls(lambda: answers.extend(pipe(prompt, max_new_tokens=3, do_sample=False))) == 3
    assert answers[0]["generated_text"].startswith("w0 w1")


def test_lm_eval_by_its_own_command(directory, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    recipe = re.search(r"python -c '(.*)' \\\n +--model hf --model_args pretrained=DIR,attn_implementation=stem ", PAGE)
    assert recipe is not None
    lines = [{"question": " ".join(WORDS), "choices": ["w1", "w2"], "answer": i % 2} for i in range(2)]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = {
        "task": "toy", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "lines.jsonl")}},
        "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "toy.yaml").write_text(json.dumps(task))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    arguments = ["--model", "hf", "--model_args", f"pretrained={directory},attn_implementation=stem,dtype=float32"]
    arguments += ["--tasks", "toy", "--include_path", str(tmp_path), "--device", "cpu", "--batch_size", "1"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
    with torch.no_grad():
        assert sparse_calls(lambda: exec(recipe[1], {})) >= 3
