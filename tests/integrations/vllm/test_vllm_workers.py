"""The plug-in in vLLM's own processes: an engine process and two tensor-parallel workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

SCRIPT = """
import json, sys
import vllm
from stem_attention.integrations.vllm import NAME, counters

def factors(worker):
    layers = worker.model_runner.vllm_config.compilation_config.static_forward_context
    return [getattr(layers[name].impl.policy, "head_factors", None) for name in sorted(layers)]

def main():
    llm = vllm.LLM(
        sys.argv[1], dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=4096, max_num_seqs=4,
        max_num_batched_tokens=333, enable_prefix_caching=False, attention_backend=NAME, **json.loads(sys.argv[3]),
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in json.load(open(sys.argv[2]))]
    greedy = vllm.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    tokens = [list(output.outputs[0].token_ids) for output in llm.generate(prompts, greedy, use_tqdm=False)]
    asked = {"counters": llm.collective_rpc(counters), "factors": llm.collective_rpc(factors)}
    print("RESULT", json.dumps({"tokens": tokens, "here": counters(), **asked}))

if __name__ == "__main__":
    main()
"""
KEEP_ALL = {"policy": "stem:block_size=64,ratio_short=1,ratio_long=1,decay=1", "dense_below": 0, "min_query_len": 32}

FACTORS = [[1e6, 1.0, 1e-6, 4.0], [4.0, 1e-6, 1e6, 1.0]]
BY_MASS = {"policy": {"policy": "mass", "head_factors": FACTORS}, "dense_below": 256, "min_query_len": 32}
TWO_WORKERS = {"tensor_parallel_size": 2}
PROMPTS = [[i * i * k % 509 for i in range(1, length)] for k, length in ((3, 900), (5, 60), (7, 500))]


def serve(model: Path, folder: Path, given: dict[str, Any], options: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """What the script printed for a model under some settings and options of vLLM, and everything that was logged."""
    script, asked = folder / "serve.py", folder / "prompts.json"
    script.write_text(SCRIPT)
    asked.write_text(json.dumps(PROMPTS))
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",  # as on a GPU: the config is pickled, and read before plug-ins are
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "OMP_NUM_THREADS": "1",
        "STEM_ATTENTION_SETTINGS": json.dumps(given),
    }
    command = [sys.executable, str(script), str(model), str(asked), json.dumps(options)]
    run = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    log = run.stdout + run.stderr
    assert run.returncode == 0, log[-3000:]
    (line,) = (line for line in run.stdout.splitlines() if line.startswith("RESULT"))
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT"))
    return result, log


def test_worker_processes_give_the_hosts_tokens_and_can_be_asked(
    llama: Path, tmp_path: Path, engine: Any, generate: Callable[..., list[list[int]]]
) -> None:
    result, log = serve(llama, tmp_path, KEEP_ALL, TWO_WORKERS)
    assert result["tokens"] == generate(engine(llama), PROMPTS, tokens=8)
    assert log.count("Stem is on in 2 of 2 attention layers") == 2, "each worker says so once"
    assert "settings from STEM_ATTENTION_SETTINGS" in log
    first, second = result["counters"]
    assert first == second
    assert 1400 < first["sparse_tokens"] <= sum(map(len, PROMPTS))
    assert result["here"]["sparse_rows"] == 0, "workers count, the process that asks them does not"


def test_each_worker_has_the_factors_of_its_own_heads(
    llama: Path, tmp_path: Path, engine: Any, generate: Callable[..., list[list[int]]]
) -> None:
    result, log = serve(llama, tmp_path, BY_MASS, TWO_WORKERS)
    assert result["factors"] == [[[row[:2]] for row in FACTORS], [[row[2:]] for row in FACTORS]]
    assert result["tokens"] == generate(engine(llama, BY_MASS, max_num_batched_tokens=333), PROMPTS, tokens=8)
    assert log.count("with head_factors of 2 x 4") == 2


def test_guessed_tokens_are_checked_by_the_host(
    llama: Path, tmp_path: Path, engine: Any, generate: Callable[..., list[list[int]]]
) -> None:
    guess = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    result, log = serve(llama, tmp_path, KEEP_ALL, {"speculative_config": guess})
    assert result["tokens"] == generate(engine(llama), PROMPTS, tokens=8)
    assert "ngram" in log
    assert result["counters"][0]["sparse_tokens"] > 1400
