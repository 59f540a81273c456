"""The recipes of docs/transformers.md: transformers' own pipeline, and lm-eval's own command."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stem_attention.policies import SinkWindow

from .tiny import SMALL, build, hosts, transformers

POLICY = SinkWindow(sink_blocks=1, window_blocks=2, block_size=16)
WORDS = [f"w{i}" for i in range(90)]
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "transformers.md").read_text()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as it is downloaded: weights, a tokenizer, and a stored policy."""
    tokenizers = pytest.importorskip("tokenizers")
    place = tmp_path_factory.mktemp("model")
    model = build(transformers.LlamaConfig(**{**SMALL, "bos_token_id": 1, "eos_token_id": 2}))
    hosts.set_policy(model, POLICY, dense_below=0)
    model.save_pretrained(place)
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(place)
    return place


def sparse_calls(run: Callable[[], Any]) -> int:
    """Calls that kept what the stored policy keeps."""
    calls: list[Any] = []
    with hosts.use_policy(observer=calls.append):
        run()
    densities = {(call.kv_len, call.density) for call in calls if call.sparse}
    assert all(density == pytest.approx(POLICY.density(tokens)) for tokens, density in densities)
    return sum(call.sparse for call in calls)


def test_a_pipeline(directory: Path) -> None:
    assert 'model_kwargs={"attn_implementation": "stem"}' in PAGE
    pipe = transformers.pipeline("text-generation", model=str(directory), model_kwargs={"attn_implementation": "stem"})
    prompt = " ".join(WORDS * 2)
    answers: list[Any] = []
    assert sparse_calls(lambda: answers.extend(pipe(prompt, max_new_tokens=3, do_sample=False))) == 3
    assert answers[0]["generated_text"].startswith("w0 w1")


def test_lm_eval_by_its_own_command(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    recipe = re.search(r"python -c '(.*)' \\\n +--model hf --model_args pretrained=DIR,attn_implementation=stem ", PAGE)
    assert recipe is not None
    lines = [{"question": " ".join(WORDS), "choices": ["w1", "w2"], "answer": i % 2} for i in range(2)]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "toy.yaml").write_text(f"""
task: toy
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "lines.jsonl"}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
""")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    arguments = ["--model", "hf", "--model_args", f"pretrained={directory},attn_implementation=stem,dtype=float32"]
    arguments += ["--tasks", "toy", "--include_path", str(tmp_path), "--device", "cpu", "--batch_size", "1"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
    with torch.no_grad():
        assert sparse_calls(lambda: exec(recipe[1], {})) >= 3
