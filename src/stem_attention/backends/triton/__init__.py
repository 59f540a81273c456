"""Portable GPU kernels in Triton: fused selection and block-sparse attention, NVIDIA since Ampere and AMD."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from stem_attention.backends.base import Request
from stem_attention.config import StemConfig
from stem_attention.selection import BlockSelection


class TritonBackend:
    """See :class:`stem_attention.backends.base.Backend`. Never waits for the device; Triton is imported at the first call."""

    name = "triton"

    def supports(self, request: Request) -> str | None:
        """bf16 and fp16, head dimensions 16 to 256, blocks of 64 and 128, on cards since Ampere or with ROCm."""
        if find_spec("triton") is None:
            return "triton is not installed: pip install 'stem-attention[gpu]'"
        if request.device.type != "cuda":
            return f"it needs a GPU, not {request.device.type}"
        if torch.version.hip is None and torch.cuda.get_device_capability(request.device) < (8, 0):
            return "it needs compute capability 8.0 (Ampere) or newer"
        if request.dtype not in (torch.bfloat16, torch.float16):
            return f"it computes bfloat16 and float16, not {request.dtype}"
        if not 16 <= request.head_dim <= 256 or request.head_dim % 8:
            return f"head_dim must be a multiple of 8 between 16 and 256, not {request.head_dim}"
        if request.block_size not in (64, 128):
            return f"block_size must be 64 or 128, not {request.block_size}"
        return None

    def select(self, q: Tensor, k: Tensor, v: Tensor, config: StemConfig, scale: float, prompt_len: int) -> BlockSelection:
        """Choose blocks by the factorised score, on the device."""
        from stem_attention.backends.triton.select import select

        indices, counts = select(q, k, v, config, scale, (prompt_len,))
        return BlockSelection(indices, counts, config.block_size, q.shape[1], k.shape[1])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float) -> tuple[Tensor, Tensor]:
        """Run the attention kernel."""
        from stem_attention.backends.triton.attention import attend

        return attend(q, k, v, selection.indices, selection.counts, selection.block_size, scale)
