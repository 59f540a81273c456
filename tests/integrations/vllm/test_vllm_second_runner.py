"""The plug-in in vLLM's second model runner, the default on GPUs: it runs on a CPU too, its kernels in Triton's interpreter."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from .served import KEEP_ALL, prompts, run_script

BESIDE = Path(__file__).parents[3] / ".triton-newest"
LENGTHS = (700, 37, 901)
SCRIPT = """
import json, sys
from types import SimpleNamespace
from triton.backends import backends

# vLLM's CPU build asks for a Triton that compiles for the CPU; the interpreter needs no compiler.
backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: False))
import vllm
from stem_attention.integrations.vllm import NAME, counters, host, runner

run, seen = host.run, []
host.run = lambda call: run(seen.append(call.batch.prompt_lens) or call)
given = json.load(open(sys.argv[1]))
prompts = [{"prompt_token_ids": prompt} for prompt in given["prompts"]]
greedy = vllm.SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False)

def serve(options):
    llm = vllm.LLM(given["model"], max_num_batched_tokens=300, **options, **given["options"])
    seen.clear()
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, greedy, use_tqdm=False)]

def stem():
    return {"tokens": serve({"attention_backend": NAME}), "lens": sorted({n for lens in seen for n in lens})}

result = {"host": serve({}), "told": stem()}
result["sparse_tokens"] = counters()["sparse_tokens"]
runner.hasattr = lambda thing, name: name != "req_idx" and hasattr(thing, name)  # as in vLLM before 0.30
result["kept"] = stem()
host.prompt_lengths = lambda: None
result["hidden"] = stem()
print("RESULT", json.dumps(result))
"""


@pytest.mark.skipif(not BESIDE.is_dir() and find_spec("triton") is None, reason="needs Triton beside vLLM: make .triton-newest")
def test_tokens_are_the_hosts_whether_it_tells_prompt_lengths_or_not(llama, tmp_path):
    result, log = run_script(
        SCRIPT,
        tmp_path,
        {"model": str(llama), "prompts": prompts(*LENGTHS)},
        VLLM_USE_V2_MODEL_RUNNER="1",
        TRITON_INTERPRET="1",
        PYTHONPATH=str(BESIDE),
        STEM_ATTENTION_SETTINGS=json.dumps(KEEP_ALL),
    )
    assert "Using V2 Model Runner" in log
    told, kept, hidden = (result[name] for name in ("told", "kept", "hidden"))
    assert told["tokens"] == kept["tokens"] == hidden["tokens"] == result["host"]
    assert sum(LENGTHS) - 100 < result["sparse_tokens"] <= sum(LENGTHS)
    assert set(told["lens"]) <= set(LENGTHS), "every chunk knows the length of its whole prompt"
    assert kept["lens"] == told["lens"]
    assert set(hidden["lens"]) > set(told["lens"]), "every chunk counts as the end of its prompt"
    assert log.count("this vLLM's runner does not tell prompt lengths") == 1
