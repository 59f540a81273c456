"""Portable GPU kernels in Triton: selection on the device and block-sparse attention, NVIDIA since Ampere and AMD."""

from stem_attention.backends.triton.backend import BLOCK_SIZES, HEAD_DIMS, TritonBackend

__all__ = ["BLOCK_SIZES", "HEAD_DIMS", "TritonBackend"]
