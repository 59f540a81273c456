"""How long the prompts of a step are as a whole: vLLM's metadata builders know only what has come so far.

Its model runners know. They build the builders in ``initialize_kv_cache``; around that call a runner announces itself, and a
builder that is built inside keeps a reference to where its runner holds the lengths. Nothing else of vLLM is touched.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import fields
from functools import wraps
from typing import Any

import vllm
from vllm.v1.attention.backend import CommonAttentionMetadata

from stem_attention.errors import UnsupportedError

PromptLens = Callable[[Any], list[int] | None]
"""Takes a step's common metadata; returns the prompt length of each row, or None where rows are not requests (warm-up)."""

# vLLM has two kinds of runners side by side and loads the one that it uses before it builds any attention layer.
_RUNNERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")
_NEEDED = ("is_prefilling", "seq_lens_cpu_upper_bound")

_building: ContextVar[Any] = ContextVar("stem_attention_vllm_runner")


def watch_runners() -> None:
    """Let runners announce themselves. Calling it again changes nothing.

    Raises:
        UnsupportedError: This vLLM is not of a kind that the plug-in knows.
    """
    missing = [name for name in _NEEDED if name not in _metadata_fields()]
    if missing:
        raise _unknown(f"its attention metadata has no {' and no '.join(missing)}")
    for module in _RUNNERS:
        runner = getattr(sys.modules.get(module), "GPUModelRunner", None)
        if runner is not None and not hasattr(runner.initialize_kv_cache, "_stem_attention"):
            runner.initialize_kv_cache = _announcing(runner.initialize_kv_cache)


def prompt_lengths() -> PromptLens:
    """Where the runner that is building now holds the lengths.

    Raises:
        UnsupportedError: No runner is building, or it is of an unknown kind.
    """
    runner = _building.get(None)
    if runner is None:
        raise _unknown("the model runner did not announce itself")
    if hasattr(runner, "input_batch"):
        if not hasattr(runner.input_batch, "num_prompt_tokens_cpu_tensor"):
            raise _unknown("its input batch holds no num_prompt_tokens_cpu_tensor")
        return lambda common: _rows_of_batch(runner, common)
    if "req_idx" not in _metadata_fields():
        raise UnsupportedError(
            f"vLLM {vllm.__version__}: its second model runner does not say which request a row belongs to, so Stem cannot "
            "know prompt lengths; start it with VLLM_USE_V2_MODEL_RUNNER=0"
        )
    if not hasattr(getattr(getattr(runner, "req_states", None), "prompt_len", None), "np"):
        raise _unknown("its request states hold no prompt_len")
    return lambda common: _rows_of_states(runner, common)


def _rows_of_batch(runner: Any, common: Any) -> list[int]:
    lengths: list[int] = runner.input_batch.num_prompt_tokens_cpu_tensor[: common.num_reqs].tolist()
    return lengths


def _rows_of_states(runner: Any, common: Any) -> list[int] | None:
    if common.req_idx is None:
        return None
    lengths: list[int] = runner.req_states.prompt_len.np[common.req_idx].tolist()
    return lengths + [0] * (common.num_reqs - len(lengths))


def _announcing(initialize: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(initialize)
    def initialize_kv_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _building.set(self)
        try:
            return initialize(self, *args, **kwargs)
        finally:
            _building.reset(token)

    initialize_kv_cache._stem_attention = True  # type: ignore[attr-defined]
    return initialize_kv_cache


def _metadata_fields() -> set[str]:
    return {field.name for field in fields(CommonAttentionMetadata)}


def _unknown(what: str) -> UnsupportedError:
    return UnsupportedError(f"Stem does not know this vLLM ({vllm.__version__}): {what}; it knows 0.26 and 0.32")
