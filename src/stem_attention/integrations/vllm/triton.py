"""vLLM's Triton backend with Stem, straight from the paged cache."""

from __future__ import annotations

from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionImpl, TritonAttentionMetadataBuilder

from stem_attention.integrations.vllm.host import StemBackend, StemBuilder, StemImpl


class StemTritonBuilder(StemBuilder, TritonAttentionMetadataBuilder):
    """Plans a step's rows."""


class StemTritonImpl(StemImpl, TritonAttentionImpl):
    """Computes sparse rows itself and lets Triton run the others."""


class StemTritonBackend(StemBackend, TritonAttentionBackend):
    """Backend that ``--attention-backend STEM`` names where Triton is the parent."""

    impl_cls = StemTritonImpl
    builder_cls = StemTritonBuilder
