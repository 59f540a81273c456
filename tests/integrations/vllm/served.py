"""What the tests ask of vLLM: engines of toy models, settings that keep everything, prompts and greedy answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "initializer_range": 0.15,
}
# The cache of keys and values has room for what four requests may have, and not more: it is filled with zeros at each start.
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 4096,
    "max_num_seqs": 4,
    "kv_cache_memory_bytes": 1 << 26,
    "enable_prefix_caching": False,
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "disable_log_stats": True,
}
KEEP_ALL = {"policy": "stem:block_size=64,ratio_short=1,ratio_long=1,decay=1", "dense_below": 0, "min_query_len": 32}


def prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    """Random prompts of given lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, SIZES["vocab_size"], (length,), generator=generator).tolist() for length in lengths]


def generate(llm: Any, asked: list[list[int]], tokens: int = 12, lora: Any = None) -> list[list[int]]:
    """Greedy tokens, one list a prompt, with an adapter if one is named."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    requests = [{"prompt_token_ids": prompt} for prompt in asked]
    outputs = llm.generate(requests, greedy, use_tqdm=False, lora_request=lora)
    return [list(output.outputs[0].token_ids) for output in outputs]


def run_script(script: str, folder: Path, given: dict[str, Any], **environment: str) -> tuple[dict[str, Any], str]:
    """What a script printed as JSON behind RESULT, in a process of its own, and everything that was logged.

    It finds what is given in the file that its first argument names.
    """
    (folder / "script.py").write_text(script)
    (folder / "given.json").write_text(json.dumps({"options": OPTIONS, **given}))
    command = [sys.executable, str(folder / "script.py"), str(folder / "given.json")]
    own = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    run = subprocess.run(command, check=False, env=own, capture_output=True, text=True, timeout=300)
    log = run.stdout + run.stderr
    assert run.returncode == 0, log[-3000:]
    (line,) = (line for line in run.stdout.splitlines() if line.startswith("RESULT"))
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT"))
    return result, log
