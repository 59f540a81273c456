"""What the GPU backends share: the Triton selection, and an attention kernel that runs right behind it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stem_attention.backends.base import Backend, Packing
from stem_attention.backends.ragged import Ragged
from stem_attention.config import StemConfig
from stem_attention.selection import BlockSelection


class FusedBackend(Backend):
    """Never waits for the device. Triton itself is imported at the first call."""

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
        """The portable kernel: see :func:`stem_attention.backends.triton.attention.attend`."""
        from stem_attention.backends.triton.attention import attend

        return attend(
            q, k, v, indices, counts, block_size, scale, return_lse=return_lse, heavy=heavy, ragged=ragged,
            page_table=page_table,
        )  # fmt: skip

    def select(self, q: Tensor, k: Tensor, v: Tensor, config: StemConfig, scale: float, prompt_len: int) -> BlockSelection:
        """Choose blocks by the factorised score, on the device."""
        from stem_attention.backends.triton.select import select

        indices, counts = select(q, k, v, config, scale, (prompt_len,))
        return BlockSelection(indices, counts, config.block_size, q.shape[1], k.shape[1])

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float, return_lse: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Run the attention kernel."""
        return self.attention(q, k, v, selection.indices, selection.counts, selection.block_size, scale, return_lse=return_lse)

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
        return self.attention(q, k, v, indices, counts, config.block_size, scale, return_lse=return_lse, heavy=heavy)

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
        return self.attention(
            q, k, v, indices, counts, config.block_size, scale, return_lse=return_lse, heavy=config.tail_blocks,
            ragged=ragged, page_table=page_table,
        )  # fmt: skip
