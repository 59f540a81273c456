"""Engines of vLLM's CPU build on small models. They run in `make test-vllm`; without vLLM their tests are skipped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from .served import OPTIONS, SIZES

if find_spec("vllm") is not None:
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "NUMBA_NUM_THREADS": "1",  # or vLLM's n-gram lookup sets OpenMP's threads, which then wait for each other in all tests
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with what starts processes of its own: no process of pytest is to be left alone with it at the end."""
    items.sort(key=lambda item: not item.path.stem.endswith(("_workers", "_second_runner")))


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


@pytest.fixture(scope="session")
def engine() -> Iterator[Callable[..., Any]]:
    """Starts an engine in this process: on Stem with a dict of settings, on the host's own backend with None.

    Engines last as long as the process, and who asks for the same gets the same: one that stops takes torch's process
    groups with it, which all share.
    """
    import vllm
    from vllm.model_executor.models import registry
    from vllm.platforms.cpu import CpuPlatform

    from stem_attention.integrations.vllm import NAME

    started: dict[str, Any] = {}

    def start(model: Path, settings: dict[str, Any] | None = None, **options: Any) -> Any:
        if settings is not None:
            options |= {"attention_backend": NAME, "additional_config": {"stem_attention": settings}}
        options = {**OPTIONS, "max_num_batched_tokens": 4096, **options}
        key = json.dumps([str(model), options], sort_keys=True)
        if key not in started:
            started[key] = vllm.LLM(str(model), **options)
        return started[key]

    with pytest.MonkeyPatch.context() as patch:
        # Two things that take vLLM seconds: it reads off a model's class in a process of its own, and for every engine
        # looks through all modules for Triton's kernels, which it has replaced already.
        patch.setattr(registry, "_run_in_subprocess", lambda read: read())
        replace_kernels = cache(CpuPlatform.register_triton_kernel_overrides)
        patch.setattr(CpuPlatform, "register_triton_kernel_overrides", staticmethod(replace_kernels))
        yield start


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
