"""vLLM's Flash backend with Stem, straight from the paged cache."""

from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

from stem_attention.integrations.vllm.host import StemBackend


class StemFlashBackend(StemBackend, FlashAttentionBackend):
    """Backend that ``--attention-backend STEM`` names where Flash is the parent."""
