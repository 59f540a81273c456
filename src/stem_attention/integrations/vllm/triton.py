"""vLLM's Triton backend with Stem, straight from the paged cache."""

from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

from stem_attention.integrations.vllm.host import StemBackend


class StemTritonBackend(StemBackend, TritonAttentionBackend):
    """Backend that ``--attention-backend STEM`` names where Triton is the parent."""
