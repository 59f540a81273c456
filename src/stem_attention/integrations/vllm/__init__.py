"""Serve models in vLLM with Stem."""

from stem_attention.integrations.vllm.plugin import NAME, counters, register, reset_counters

__all__ = ["NAME", "counters", "register", "reset_counters"]
