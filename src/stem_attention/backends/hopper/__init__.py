"""The attention kernel for Hopper in Gluon, Triton's lower-level language; selection is the portable one."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from stem_attention.backends.base import Request
from stem_attention.backends.fused import FusedBackend
from stem_attention.backends.ragged import Ragged

HEAD_DIMS = (64, 128, 256)
BLOCK_SIZES = (64, 128)


class HopperBackend(FusedBackend):
    """Warp-specialised attention. Calls that the copy engine cannot serve run the portable kernel instead.

    Those are: queries, keys or values whose address or strides are no multiple of 16 bytes, and caches whose pages hold no
    whole multiple of 64 tokens. :meth:`supports` does not see either, only the device, the dtype and the sizes.
    """

    name = "hopper"
    # H200: at 8192 tokens the whole call beats cuDNN 1.56x (32/8/128), 1.56x (28/4/128), 1.74x (32/8/64), 1.03x (8/4/256).
    crossover = 8192

    def supports(self, request: Request) -> str | None:
        """bf16 and fp16, head dimensions 64, 128 and 256, blocks of 64 and 128, on compute capability 9.0."""
        if find_spec("triton") is None:
            return "triton is not installed: pip install 'stem-attention[gpu]'"
        if request.device.type != "cuda":
            return f"it needs a GPU, not {request.device.type}"
        if not torch.cuda.is_available():
            return "torch sees no GPU"
        if torch.version.hip is not None or torch.cuda.get_device_capability(request.device) != (9, 0):
            return "it needs compute capability 9.0 (Hopper)"
        if request.dtype not in (torch.bfloat16, torch.float16):
            return f"it computes bfloat16 and float16, not {request.dtype}"
        if request.head_dim not in HEAD_DIMS:
            return f"head_dim must be 64, 128 or 256, not {request.head_dim}"
        if request.block_size not in BLOCK_SIZES:
            return f"block_size must be 64 or 128, not {request.block_size}"
        return None

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        indices: Tensor,
        counts: Tensor,
        block_size: int,
        scale: float,
        *,
        return_lse: bool = True,
        heavy: int = 0,
        ragged: Ragged | None = None,
        page_table: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See :func:`stem_attention.backends.hopper.attention.attend`."""
        from stem_attention.backends.hopper.attention import attend, can_copy

        if not can_copy(q, k, v, paged=page_table is not None):
            return super().attention(
                q, k, v, indices, counts, block_size, scale, return_lse=return_lse, heavy=heavy, ragged=ragged,
                page_table=page_table,
            )  # fmt: skip
        return attend(
            q, k, v, indices, counts, block_size, scale, return_lse=return_lse, heavy=heavy, ragged=ragged,
            page_table=page_table,
        )  # fmt: skip
