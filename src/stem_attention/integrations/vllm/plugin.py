"""Serve models in vLLM with Stem: ``vllm serve MODEL --attention-backend STEM``.

vLLM finds the plug-in by its entry point. Long prompts are read sparsely, straight from the paged cache; all else goes to
vLLM's own attention. docs/vllm.md tells more.
"""

from importlib import import_module
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from stem_attention.integrations.serving.counters import COUNTERS
from stem_attention.integrations.serving.settings import read_settings

__all__ = ["NAME", "counters", "register", "reset_counters"]

NAME = "STEM" if hasattr(AttentionBackendEnum, "register") else "CUSTOM"
"""Value of ``--attention-backend``: a name of our own where vLLM takes one (0.32 does, 0.26 does not)."""


def register() -> None:
    """Make ``--attention-backend STEM`` known; vLLM's entry point, called in each of its processes.

    Raises:
        ValueError: ``STEM_ATTENTION_SETTINGS`` is bad; the message names the field.
    """
    read_settings()
    path = f"{__package__}.flash.StemFlashBackend" if current_platform.is_cuda() else f"{__package__}.triton.StemTritonBackend"
    if current_platform.is_cpu():  # this platform looks at nothing but its own backend
        path = f"{__package__}.cpu.StemCPUBackend"
        register_backend(AttentionBackendEnum.CPU_ATTN, path)
    if NAME not in AttentionBackendEnum.__members__:
        register_backend(NAME, path)
        # vLLM pickles its config for processes that load plug-ins only after they have read it.
        AttentionBackendEnum[NAME].__reduce_ex__ = lambda protocol: (own_backend, ())
    elif NAME == "CUSTOM":
        register_backend(AttentionBackendEnum.CUSTOM, path)
    _register_mla_prefill()


def _register_mla_prefill() -> None:
    """Make Stem what ``mla_prefill_backend="CUSTOM"`` of ``--attention-config`` means, where this vLLM has such backends."""
    try:
        registry = import_module("vllm.v1.attention.backends.mla.prefill.registry")
    except ModuleNotFoundError:
        return
    members, path = registry.MLAPrefillBackendEnum, f"{__package__}.mla.StemMLAPrefill"
    if current_platform.is_cpu():  # this platform looks at nothing but its own backend
        registry.register_mla_prefill_backend(members.CPU, path)
    if not members.CUSTOM.is_overridden():
        registry.register_mla_prefill_backend(members.CUSTOM, path)


def own_backend() -> Any:
    """Return the member of vLLM's list of backends that stands for Stem, in any process."""
    if NAME not in AttentionBackendEnum.__members__:
        register()
    return AttentionBackendEnum[NAME]


def counters(_worker: object = None) -> dict[str, Any]:
    """Return the :class:`..serving.counters.Counters` of this process as JSON types; ``collective_rpc`` asks all workers."""
    return COUNTERS.to_dict()


def reset_counters(_worker: object = None) -> None:
    """Start counting again; :func:`counters` tells how to in every worker."""
    COUNTERS.reset()
