"""The plug-in in vLLM's own processes: an engine process and two workers, tensor-parallel or two stages of a pipeline."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from .served import generate, run_script

SCRIPT = """
import json, logging, sys
import vllm
from stem_attention.integrations.serving.report import report
from stem_attention.integrations.vllm import NAME, counters
from vllm.v1.metrics.prometheus import get_prometheus_registry

def factors(worker):
    layers = worker.model_runner.vllm_config.compilation_config.static_forward_context
    return [layers[name].impl.policy.head_factors for name in sorted(layers)]

def tell(worker):
    report(logging.getLogger())

def metrics():
    "What the server's /metrics shows of ours."
    samples = [sample for metric in get_prometheus_registry().collect() for sample in metric.samples]
    return {sample.name: sample.value for sample in samples if sample.name.startswith("stem")}

def main():
    given = json.load(open(sys.argv[1]))
    options = {"max_num_batched_tokens": 333, **given["options"], **given["workers"]}
    llm = vllm.LLM(given["model"], attention_backend=NAME, **options)
    prompts = [{"prompt_token_ids": prompt} for prompt in given["prompts"]]
    greedy = vllm.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    tokens = [list(output.outputs[0].token_ids) for output in llm.generate(prompts, greedy, use_tqdm=False)]
    llm.collective_rpc(tell)
    asked = {"counters": llm.collective_rpc(counters), "factors": llm.collective_rpc(factors), "metrics": metrics()}
    print("RESULT", json.dumps({"tokens": tokens, "here": counters(), **asked}))

if __name__ == "__main__":
    main()
"""
FACTORS = [[1e6, 1.0, 1e-6, 4.0], [4.0, 1e-6, 1e6, 1.0]]
BY_MASS = {"policy": {"policy": "mass", "head_factors": FACTORS}, "dense_below": 256, "min_query_len": 32}
PROMPTS = [[i * i * k % 509 for i in range(1, length)] for k, length in ((3, 900), (5, 60), (7, 500))]


def test_worker_processes_give_one_process_tokens_each_with_the_factors_of_its_own_heads(llama, tmp_path, engine):
    (tmp_path / "metrics").mkdir()
    result, log = run_script(
        SCRIPT,
        tmp_path,
        {"model": str(llama), "prompts": PROMPTS, "workers": {"tensor_parallel_size": 2}},
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_WORKER_MULTIPROCESSING_METHOD="spawn",  # as on a GPU: the config is pickled, and read before plug-ins are
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",
        STEM_ATTENTION_SETTINGS=json.dumps(BY_MASS),
        PROMETHEUS_MULTIPROC_DIR=str(tmp_path / "metrics"),
    )
    assert result["factors"] == [[[row[:2]] for row in FACTORS], [[row[2:]] for row in FACTORS]]
    expected = generate(engine(llama, BY_MASS, max_num_batched_tokens=333), PROMPTS, tokens=8)
    assert result["tokens"] == expected
    assert generate(engine(llama), PROMPTS, tokens=8) != expected, "what is left out matters to this model"
    assert log.count("Stem is on in 2 of 2 attention layers") == 2, "each worker says so once"
    assert log.count("with head_factors of 2 x 4") == 2
    assert "settings from STEM_ATTENTION_SETTINGS" in log
    first, second = result["counters"]
    of_heads = {"kept_blocks", "density"}
    assert {name for name in first if first[name] != second[name]} == of_heads, "each counts what its own heads keep"
    sums = {f"stem_attention_{name}_total": first[name] + second[name] for name in ("causal_blocks", "kept_blocks")}
    assert result["metrics"] == sums, "Prometheus has the blocks of all workers"
    assert 1300 < first["sparse_tokens"] <= sum(map(len, PROMPTS))
    assert result["here"]["sparse_rows"] == 0, "workers count, the process that asks them does not"


def test_two_stages_of_a_pipeline_give_the_tokens_of_vllms_own_attention(llama, tmp_path, engine):
    # In eager mode the CPU build skips the warm-up that makes room for what one stage hands to the next.
    compiled = {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}}
    result, log = run_script(
        SCRIPT,
        tmp_path,
        {"model": str(llama), "prompts": PROMPTS, "workers": {"pipeline_parallel_size": 2, **compiled}},
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_WORKER_MULTIPROCESSING_METHOD="spawn",
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",
        STEM_ATTENTION_SETTINGS=json.dumps({"policy": "mass:tail_blocks=1000", "dense_below": 0, "min_query_len": 32}),
    )
    assert result["tokens"] == generate(engine(llama), PROMPTS, tokens=8)
    assert log.count("Stem is on in 1 of 1 attention layers") == 2, "each stage has a layer"
    for stage in result["counters"]:
        assert stage["density"] == 1
        assert 1300 < stage["sparse_tokens"] <= sum(map(len, PROMPTS)), "stages have the same rows"
