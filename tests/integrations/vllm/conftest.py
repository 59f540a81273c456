"""Engines of vLLM's CPU build on small models. They run in `make test-vllm`; without vLLM their tests are skipped."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

if find_spec("vllm") is not None:
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }

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

Engines = Callable[..., Any]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes the directory of a random model: ``models("LlamaConfig", num_hidden_layers=2)``."""

    def make(kind: str = "LlamaConfig", **fields: Any) -> Path:
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, kind)(**{"num_hidden_layers": 2, **SIZES, **fields})
        path = tmp_path_factory.mktemp(kind)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="session")
def llama(models: Callable[..., Path]) -> Path:
    return models()


@pytest.fixture
def engine() -> Iterator[Engines]:
    """Starts an engine in this process: on Stem with a dict of settings, on the host's own backend with None."""
    started: list[Any] = []

    def start(model: Path, settings: dict[str, Any] | None = None, **options: Any) -> Any:
        import vllm

        from stem_attention.integrations.vllm import NAME

        if settings is not None:
            options |= {"attention_backend": NAME, "additional_config": {"stem_attention": settings}}
        defaults = {"dtype": "float32", "max_model_len": 4096, "max_num_seqs": 4, "max_num_batched_tokens": 4096}
        quiet = {"enforce_eager": True, "skip_tokenizer_init": True, "disable_log_stats": True}
        started.append(vllm.LLM(str(model), **defaults | quiet | {"enable_prefix_caching": False} | options))
        return started[-1]

    yield start
    started.clear()
    gc.collect()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every sparse call of the plug-in in this process, one a layer and step."""
    from stem_attention.integrations.vllm import host

    seen: list[Any] = []
    run = host.run
    monkeypatch.setattr(host, "run", lambda call: run(seen.append(call) or call))
    return seen


@pytest.fixture(autouse=True)
def fresh_counters() -> None:
    if find_spec("vllm") is not None:
        from stem_attention.integrations.vllm import reset_counters

        reset_counters()


def answer(llm: Any, prompts: list[list[int]], tokens: int = 12) -> list[Any]:
    """vLLM's greedy outputs."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    outputs: list[Any] = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
    return outputs


@pytest.fixture(scope="session")
def generate() -> Callable[..., list[list[int]]]:
    """Greedy tokens: ``generate(llm, prompts, tokens=12)``."""
    return lambda llm, prompts, tokens=12: [list(o.outputs[0].token_ids) for o in answer(llm, prompts, tokens)]


@pytest.fixture(scope="session")
def prompts() -> Callable[..., list[list[int]]]:
    """Random prompts of given lengths: ``prompts(700, 37)``."""

    def make(*lengths: int, seed: int = 1) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(0, SIZES["vocab_size"], (length,), generator=generator).tolist() for length in lengths]

    return make
