"""The plug-in in vLLM's second model runner, the default on GPUs: it runs on a CPU too, its kernels in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

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
prompts = [{"prompt_token_ids": prompt} for prompt in json.load(open(sys.argv[2]))]
greedy = vllm.SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False)

def serve(options):
    llm = vllm.LLM(
        sys.argv[1], dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=4096, max_num_seqs=4,
        max_num_batched_tokens=300, enable_prefix_caching=False, **options,
    )
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
def test_tokens_are_the_hosts_whether_it_tells_prompt_lengths_or_not(
    llama: Path, tmp_path: Path, prompts: Callable[..., list[list[int]]]
) -> None:
    script, asked = tmp_path / "serve.py", tmp_path / "prompts.json"
    script.write_text(SCRIPT)
    asked.write_text(json.dumps(prompts(*LENGTHS)))
    keep_all = {"policy": "stem:block_size=64,ratio_short=1,ratio_long=1,decay=1", "dense_below": 0, "min_query_len": 32}
    environment = os.environ | {
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(BESIDE),
        "STEM_ATTENTION_SETTINGS": json.dumps(keep_all),
    }
    command = [sys.executable, str(script), str(llama), str(asked)]
    run = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    log = run.stdout + run.stderr
    assert run.returncode == 0, log[-3000:]
    assert "Using V2 Model Runner" in log
    (line,) = (line for line in run.stdout.splitlines() if line.startswith("RESULT"))
    result = json.loads(line.removeprefix("RESULT"))
    told, kept, hidden = (result[name] for name in ("told", "kept", "hidden"))
    assert told["tokens"] == kept["tokens"] == hidden["tokens"] == result["host"]
    assert sum(LENGTHS) - 100 < result["sparse_tokens"] <= sum(LENGTHS)
    assert set(told["lens"]) <= set(LENGTHS), "every chunk knows the length of its whole prompt"
    assert kept["lens"] == told["lens"]
    assert set(hidden["lens"]) > set(told["lens"]), "every chunk counts as the end of its prompt"
    assert log.count("this vLLM's runner does not tell prompt lengths") == 1
