"""What the GPU backends share: the Triton selection, and an attention kernel that runs right behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TypeAlias

import torch
from torch import Tensor

from stem_attention.backends.base import Backend, Packing, Request
from stem_attention.backends.ragged import Ragged
from stem_attention.config import StemConfig
from stem_attention.selection import BlockSelection

AttentionKernel: TypeAlias = Callable[..., tuple[Tensor, Tensor]]
"""Takes what :func:`stem_attention.backends.triton.attention.attend` takes."""


def gpu_obstacle(request: Request) -> str | None:
    """Why no kernel in Triton could serve a request on any card, or None."""
    if find_spec("triton") is None:
        return "triton is not installed: pip install 'stem-attention[gpu]'"
    if request.device.type != "cuda":
        return f"it needs a GPU, not {request.device.type}"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if request.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes bfloat16 and float16, not {request.dtype}"
    return None


class FusedBackend(Backend):
    """Never waits for the device. Triton itself is imported at the first call."""

    def kernel(self, q: Tensor, k: Tensor, v: Tensor, *, paged: bool) -> AttentionKernel:
        """What attends: the portable kernel, see :func:`stem_attention.backends.triton.attention.attend`."""
        from stem_attention.backends.triton.attention import attend

        return attend

    def select(self, q: Tensor, k: Tensor, v: Tensor, config: StemConfig, scale: float, prompt_len: int) -> BlockSelection:
        """Choose blocks by the factorised score, on the device."""
        from stem_attention.backends.triton.select import select

        indices, counts = select(q, k, v, config, scale, (prompt_len,))
        return BlockSelection(indices, counts, config.block_size, q.shape[1], k.shape[1])

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float, return_lse: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Run the attention kernel."""
        attend, lists = self.kernel(q, k, v, paged=False), (selection.indices, selection.counts)
        return attend(q, k, v, *lists, selection.block_size, scale, return_lse=return_lse)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, config: StemConfig, scale: float, prompt_len: int, return_lse: bool
    ) -> tuple[Tensor, Tensor]:
        """Select and attend back to back; rows that keep everything never get a list."""
        if prompt_len < self.dense_limit(config):
            return super().forward(q, k, v, config, scale, prompt_len, return_lse)
        from stem_attention.backends.triton.select import select

        indices, counts = select(q, k, v, config, scale, (prompt_len,), implicit=True)
        # The tail's rows are the prompt's last: a chunk before the end has none.
        heavy = config.tail_blocks if prompt_len == k.shape[1] else 0
        attend = self.kernel(q, k, v, paged=False)
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
        from stem_attention.backends.triton.select import select

        ragged = Ragged.of(packing, q.device)
        indices, counts = select(
            q, k, v, config, scale, prompt_lens, implicit=True, dense_below=self.dense_limit(config),
            ragged=ragged, page_table=page_table,
        )  # fmt: skip
        attend = self.kernel(q, k, v, paged=page_table is not None)
        return attend(
            q, k, v, indices, counts, config.block_size, scale, return_lse=return_lse, heavy=config.tail_blocks,
            ragged=ragged, page_table=page_table,
        )  # fmt: skip
