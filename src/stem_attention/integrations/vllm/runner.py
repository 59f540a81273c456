"""Lengths of whole prompts: vLLM's metadata builders know only the tokens that have come so far.

Its model runners know. They build the builders in ``initialize_kv_cache``; around that call a runner announces itself, and a
builder that is built inside keeps a reference to where its runner holds the lengths. The second of vLLM's two runners holds
them by request; which request a row of a step belongs to, its metadata say since 0.30, and before that the batch that it
prepares for the step, which is kept. Nothing else of vLLM is touched.
"""

import sys
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import Any

PromptLens = Callable[[Any], list[int]]
"""Takes a step's common metadata; returns the prompt length of each row, or fewer where rows are not requests."""

# vLLM has two kinds of runners side by side and loads the one that it uses before it builds any attention layer.
_RUNNERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")

_building: ContextVar[Any] = ContextVar("stem_attention_vllm_runner", default=None)


def watch_runners() -> None:
    """Let runners announce themselves and keep their batches. Calling it again changes nothing."""
    for module in _RUNNERS:
        runner = getattr(sys.modules.get(module), "GPUModelRunner", None)
        if runner is not None and not hasattr(runner, "stem_batch"):
            runner.stem_batch = None
            runner.initialize_kv_cache = _announcing(runner.initialize_kv_cache)
            if hasattr(runner, "prepare_inputs"):
                runner.prepare_inputs = _keeping(runner.prepare_inputs)


def prompt_lengths() -> PromptLens | None:
    """Return how to read in a step what the runner that is building now holds; None where its kind is not known."""
    runner = _building.get()
    if hasattr(getattr(runner, "input_batch", None), "num_prompt_tokens_cpu_tensor"):
        return lambda common: list(runner.input_batch.num_prompt_tokens_cpu_tensor[: common.num_reqs].tolist())
    if hasattr(getattr(runner, "req_states", None), "prompt_len"):
        return lambda common: list(runner.req_states.prompt_len.np[_requests(runner, common)].tolist())
    return None


def _requests(runner: Any, common: Any) -> Any:
    """Place of each row's request among all of the runner's, int32 ``(rows,)``; none in steps that it makes up to warm up."""
    if hasattr(common, "req_idx"):
        return [] if common.req_idx is None else common.req_idx
    batch = runner.stem_batch
    is_of_step = batch is not None and batch.query_start_loc_np.ctypes.data == common.query_start_loc_cpu.data_ptr()
    return batch.idx_mapping_np if is_of_step else []


def _announcing(initialize: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(initialize)
    def initialize_kv_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _building.set(self)
        try:
            return initialize(self, *args, **kwargs)
        finally:
            _building.reset(token)

    return initialize_kv_cache


def _keeping(prepare: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(prepare)
    def prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.stem_batch = prepare(self, *args, **kwargs)
        return self.stem_batch

    return prepare_inputs
