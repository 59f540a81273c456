"""The attention kernel for Hopper in Gluon, Triton's lower-level language; selection is the portable one."""

from __future__ import annotations

import torch
from torch import Tensor

from stem_attention.backends.base import Request
from stem_attention.backends.fused import AttentionKernel, FusedBackend, gpu_obstacle

HEAD_DIMS = (64, 128, 256)
BLOCK_SIZES = (64, 128)


class HopperBackend(FusedBackend):
    """Warp-specialised attention. Calls that the copy engine cannot serve run the portable kernel instead.

    Those are: queries, keys or values whose address or strides are no multiple of 16 bytes or whose strides are 0, and caches
    whose pages hold no whole multiple of 64 tokens. :meth:`supports` does not see either, but ``explain()`` says so.
    """

    name = "hopper"
    caveat = "addresses and strides that are no multiple of 16 bytes, and pages of no multiple of 64 tokens, run portably"
    # H200: at 8192 tokens the whole call beats cuDNN 2.19x (32/8/128), 2.09x (32/8/64), 1.62x (8/4/256); at 4096 1.28x
    # (32/8/128), but there it keeps the host longer than the GPU.
    crossover = 8192

    def supports(self, request: Request) -> str | None:
        """bf16 and fp16, head dimensions 64, 128 and 256, blocks of 64 and 128, on compute capability 9.0."""
        obstacle = gpu_obstacle(request)
        if obstacle is not None:
            return obstacle
        if torch.version.hip is not None or torch.cuda.get_device_capability(request.device) != (9, 0):
            return "it needs compute capability 9.0 (Hopper)"
        if request.head_dim not in HEAD_DIMS:
            return f"head_dim must be 64, 128 or 256, not {request.head_dim}"
        if request.block_size not in BLOCK_SIZES:
            return f"block_size must be 64 or 128, not {request.block_size}"
        return None

    def kernel(self, q: Tensor, k: Tensor, v: Tensor, *, paged: bool) -> AttentionKernel:
        """:func:`stem_attention.backends.hopper.attention.attend`, or the portable kernel where the copy engine will not do."""
        from stem_attention.backends.hopper.attention import attend, can_copy

        return attend if can_copy(q, k, v, paged=paged) else super().kernel(q, k, v, paged=paged)
