"""Portable GPU kernels in Triton: fused selection and block-sparse attention, NVIDIA since Ampere and AMD."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from stem_attention.backends.base import Backend, Packing, Request
from stem_attention.config import StemConfig
from stem_attention.selection import BlockSelection

HEAD_DIMS = range(16, 257, 8)
BLOCK_SIZES = (64, 128)


class TritonBackend(Backend):
    """Never waits for the device. Triton itself is imported at the first call."""

    name = "triton"
    crossover = 12288  # H200, heads 32/8/128, 28/4/128, 32/8/64 and 8/4/256 against cuDNN: the last one crosses latest

    def supports(self, request: Request) -> str | None:
        """bf16 and fp16, head dimensions 16 to 256, blocks of 64 and 128, on cards since Ampere or with ROCm."""
        if find_spec("triton") is None:
            return "triton is not installed: pip install 'stem-attention[gpu]'"
        if request.device.type != "cuda":
            return f"it needs a GPU, not {request.device.type}"
        if not torch.cuda.is_available():
            return "torch sees no GPU"
        if torch.version.hip is None and torch.cuda.get_device_capability(request.device) < (8, 0):
            return "it needs compute capability 8.0 (Ampere) or newer"
        if request.dtype not in (torch.bfloat16, torch.float16):
            return f"it computes bfloat16 and float16, not {request.dtype}"
        if request.head_dim not in HEAD_DIMS:
            return f"head_dim must be a multiple of 8 between 16 and 256, not {request.head_dim}"
        if request.block_size not in BLOCK_SIZES:
            return f"block_size must be 64 or 128, not {request.block_size}"
        return None

    def select(self, q: Tensor, k: Tensor, v: Tensor, config: StemConfig, scale: float, prompt_len: int) -> BlockSelection:
        """Choose blocks by the factorised score, on the device."""
        from stem_attention.backends.triton.select import select

        indices, counts = select(q, k, v, config, scale, (prompt_len,))
        return BlockSelection(indices, counts, config.block_size, q.shape[1], k.shape[1])

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float, return_lse: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Run the attention kernel."""
        from stem_attention.backends.triton.attention import attend

        return attend(q, k, v, selection.indices, selection.counts, selection.block_size, scale, return_lse=return_lse)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, config: StemConfig, scale: float, prompt_len: int, return_lse: bool
    ) -> tuple[Tensor, Tensor]:
        """Select and attend back to back; rows that keep everything never get a list."""
        if prompt_len < self.dense_limit(config):
            return super().forward(q, k, v, config, scale, prompt_len, return_lse)
        from stem_attention.backends.triton.attention import attend
        from stem_attention.backends.triton.select import select

        indices, counts = select(q, k, v, config, scale, (prompt_len,), implicit=True)
        # The tail's rows are the prompt's last: a chunk before the end has none.
        heavy = config.tail_blocks if prompt_len == k.shape[1] else 0
        return attend(q, k, v, indices, counts, config.block_size, scale, return_lse=return_lse, heavy=heavy)

    def forward_varlen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        packing: Packing,
        page_table: Tensor | None,
        config: StemConfig,
        scale: float,
        prompt_lens: Sequence[int],
        return_lse: bool,
    ) -> tuple[Tensor, Tensor]:
        """The whole batch in one launch of each kernel."""
        if config.magnitude == "zscore" or q.shape[0] == 0:  # the z-score's statistics are taken per sequence
            return super().forward_varlen(q, k, v, packing, page_table, config, scale, prompt_lens, return_lse)
        from stem_attention.backends.triton.attention import Ragged, attend
        from stem_attention.backends.triton.select import select

        ragged = Ragged.of(packing, q.device)
        indices, counts = select(
            q, k, v, config, scale, prompt_lens, implicit=True, dense_below=self.dense_limit(config),
            ragged=ragged, page_table=page_table,
        )  # fmt: skip
        return attend(
            q, k, v, indices, counts, config.block_size, scale, return_lse=return_lse, heavy=config.tail_blocks,
            ragged=ragged, page_table=page_table,
        )  # fmt: skip
