"""Serve models in vLLM with Stem.

    pip install 'stem-attention[vllm]'
    vllm serve MODEL --attention-backend CUSTOM

vLLM finds the plug-in by its entry point. Prompts are read sparsely, straight from the paged cache, also in chunks, behind
cached prefixes and beside requests that already answer. Everything else goes to vLLM's own attention: answers, short prompts
and chunks, sliding windows, ALiBi, soft caps, sinks, encoders, cross-attention, quantised caches. docs/vllm.md tells more.
"""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from stem_attention.integrations.serving_counters import COUNTERS
from stem_attention.integrations.serving_settings import read_settings

__all__ = ["counters", "register", "reset_counters"]


def register() -> None:
    """vLLM's entry point, called in each of its processes: make ``--attention-backend CUSTOM`` known.

    Raises:
        ValueError: ``STEM_ATTENTION_CONFIG`` is bad; the message names the field.
    """
    read_settings()
    if current_platform.is_cpu():  # this platform looks at nothing but its own backend
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{__package__}.vllm_cpu.StemCPUBackend")
        register_backend(AttentionBackendEnum.CUSTOM, f"{__package__}.vllm_cpu.StemCPUBackend")
    elif current_platform.is_cuda():
        register_backend(AttentionBackendEnum.CUSTOM, f"{__package__}.vllm_flash.StemFlashBackend")
    else:
        register_backend(AttentionBackendEnum.CUSTOM, f"{__package__}.vllm_triton.StemTritonBackend")


def counters(_worker: object = None) -> dict[str, Any]:
    """What the plug-in has done in this process so far, see :class:`.serving_counters.Counters`.

    Args:
        _worker: Ignored; ``llm.collective_rpc(counters)`` passes it and asks every worker.
    """
    return COUNTERS.to_dict()


def reset_counters(_worker: object = None) -> None:
    """Start counting again. Argument as in :func:`counters`."""
    COUNTERS.reset()
