"""Portable GPU kernels in Triton: fused selection and block-sparse attention, NVIDIA since Ampere and AMD."""

from __future__ import annotations

import torch

from stem_attention.backends.base import Request
from stem_attention.backends.fused import FusedBackend, gpu_obstacle

HEAD_DIMS = range(16, 257, 8)
BLOCK_SIZES = (64, 128)


class TritonBackend(FusedBackend):
    """Selection and attention in portable Triton."""

    name = "triton"
    # H200: at 8192 tokens the whole call beats cuDNN 1.56x (32/8/128), 1.56x (28/4/128), 1.74x (32/8/64), 1.03x (8/4/256).
    crossover = 8192

    def supports(self, request: Request) -> str | None:
        """bf16 and fp16, head dimensions 16 to 256, blocks of 64 and 128, on cards since Ampere or with ROCm."""
        obstacle = gpu_obstacle(request)
        if obstacle is not None:
            return obstacle
        if torch.version.hip is None and torch.cuda.get_device_capability(request.device) < (8, 0):
            return "it needs compute capability 8.0 (Ampere) or newer"
        if request.head_dim not in HEAD_DIMS:
            return f"head_dim must be a multiple of 8 between 16 and 256, not {request.head_dim}"
        if request.block_size not in BLOCK_SIZES:
            return f"block_size must be 64 or 128, not {request.block_size}"
        return None
