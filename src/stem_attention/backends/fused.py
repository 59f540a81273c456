"""What the GPU backends share: the Triton selection, and an attention kernel that runs right behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TypeAlias

import torch
from torch import Tensor

from stem_attention.backends.base import Backend, Packing, Request
from stem_attention.backends.pieces import pieces, runs
from stem_attention.backends.ragged import Ragged
from stem_attention.config import StemConfig
from stem_attention.errors import UnsupportedError
from stem_attention.selection import BlockSelection

_MOST_SEQUENCES = 65535  # of the second and third dimension of a grid
_LEAST_SCALE = torch.finfo(torch.float32).smallest_normal

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


def _check_grid(sequences: int) -> None:
    if sequences > _MOST_SEQUENCES:
        raise UnsupportedError(f"a GPU's grid takes {_MOST_SEQUENCES} sequences, not {sequences}; split the batch")


def _positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same scores with a scale above 0: kernels scale the largest score, and the future's minus infinity."""
    if scale >= _LEAST_SCALE:
        return q, scale
    return (q * -1.0, -scale) if scale <= -_LEAST_SCALE else (q * 0.0, 1.0)


class FusedBackend(Backend):
    """Never waits for the device. Triton itself is imported at the first call."""

    def kernel(self, q: Tensor, k: Tensor, v: Tensor, *, paged: bool) -> AttentionKernel:
        """What attends: the portable kernel, see :func:`stem_attention.backends.triton.attention.attend`."""
        from stem_attention.backends.triton.attention import attend

        return attend

    def select(self, q: Tensor, k: Tensor, v: Tensor, config: StemConfig, scale: float, prompt_len: int) -> BlockSelection:
        """Choose blocks as the config says, on the device."""
        _check_grid(q.shape[0])
        from stem_attention.backends.triton.select import select

        indices, counts = select(q, k, v, config, scale, (prompt_len,))
        return BlockSelection(indices, counts, config.block_size, q.shape[1], k.shape[1])

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float, return_lse: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Run the attention kernel."""
        _check_grid(q.shape[0])
        # Kernels read lists one after the other: those of an expanded or sliced selection do not lie so.
        lists = selection.indices.contiguous(), selection.counts.contiguous()
        q, scale = _positive_scale(q, scale)
        attend = self.kernel(q, k, v, paged=False)
        return attend(q, k, v, *lists, selection.block_size, scale, return_lse=return_lse)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, config: StemConfig, scale: float, prompt_len: int, return_lse: bool
    ) -> tuple[Tensor, Tensor]:
        """Select and attend back to back; rows that keep everything never get a list."""
        if prompt_len < self.dense_limit(config):
            return super().forward(q, k, v, config, scale, prompt_len, return_lse)
        _check_grid(q.shape[0])
        from stem_attention.backends.triton.select import select

        def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            indices, counts = select(q, k, v, config, scale, (prompt_len,), implicit=True)
            # The tail's rows are the prompt's last: a chunk before the end has none.
            heavy = config.tail_blocks if prompt_len == k.shape[1] else 0
            q, factor = _positive_scale(q, scale)
            attend = self.kernel(q, k, v, paged=False)
            return attend(q, k, v, indices, counts, config.block_size, factor, return_lse=return_lse, heavy=heavy)

        parts = runs(q.shape[1], k.shape[1], q.shape[0] * q.shape[2], config)
        if len(parts) == 1:
            return run(q, k, v)
        out, norms, start = torch.empty(q.shape, dtype=q.dtype, device=q.device), [], k.shape[1] - q.shape[1]
        for low, high in parts:
            part = slice(low - start, high - start)
            out[:, part], norm = run(q[:, part], k[:, :high], v[:, :high])
            norms.append(norm)
        return out, torch.cat(norms, 2) if return_lse else norms[0]

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
        """The whole batch in one launch of each kernel, unless its lists would take too much room."""
        if config.magnitude == "zscore" or q.shape[0] == 0:  # the z-score's statistics are taken per sequence
            return super().forward_varlen(q, k, v, packing, page_table, config, scale, prompt_lens, return_lse)
        _check_grid(len(prompt_lens))
        if page_table is not None and page_table.stride(1) != 1:
            page_table = page_table.contiguous()
        parts = pieces(packing, q.shape[1], config)
        if len(parts) == 1:
            return self._packed(q, k, v, packing, page_table, prompt_lens, config, scale, return_lse)
        out, norms = torch.empty(q.shape, dtype=q.dtype, device=q.device), []
        for part in parts:
            of, queries, keys = slice(*part.sequences), slice(*part.queries), slice(*part.keys)
            own_k, own_v, table = (k[keys], v[keys], None) if page_table is None else (k, v, page_table[of])
            out[queries], norm = self._packed(
                q[queries], own_k, own_v, part.packing, table, prompt_lens[of], config, scale, return_lse
            )
            norms.append(norm)
        return out, torch.cat(norms, 1) if return_lse else norms[0]

    def _packed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        packing: Packing,
        page_table: Tensor | None,
        prompt_lens: Sequence[int],
        config: StemConfig,
        scale: float,
        return_lse: bool,
    ) -> tuple[Tensor, Tensor]:
        from stem_attention.backends.triton.select import select

        ragged = Ragged.of(packing, q.device)
        indices, counts = select(
            q, k, v, config, scale, prompt_lens, implicit=True, dense_below=self.dense_limit(config),
            ragged=ragged, page_table=page_table,
        )  # fmt: skip
        q, scale = _positive_scale(q, scale)
        attend = self.kernel(q, k, v, paged=page_table is not None)
        return attend(
            q, k, v, indices, counts, config.block_size, scale, return_lse=return_lse, heavy=config.tail_blocks,
            ragged=ragged, page_table=page_table,
        )  # fmt: skip
