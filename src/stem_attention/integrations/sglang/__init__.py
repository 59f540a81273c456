"""Serve models in SGLang with Stem."""

from stem_attention.integrations.sglang.plugin import NAME, create, register

__all__ = ["NAME", "create", "register"]
