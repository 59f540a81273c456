"""vLLM's Flash backend with Stem, straight from the paged cache."""

from __future__ import annotations

from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl, FlashAttentionMetadataBuilder

from stem_attention.integrations.vllm.host import StemBackend, StemBuilder, StemImpl


class StemFlashBuilder(StemBuilder, FlashAttentionMetadataBuilder):
    """Plans a step's rows."""


class StemFlashImpl(StemImpl, FlashAttentionImpl):
    """Computes sparse rows itself and lets Flash run the others."""


class StemFlashBackend(StemBackend, FlashAttentionBackend):
    """Backend that ``--attention-backend STEM`` names where Flash is the parent."""

    impl_cls = StemFlashImpl
    builder_cls = StemFlashBuilder
