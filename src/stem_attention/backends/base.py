"""What a backend is: something that selects blocks and runs attention over a selection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stem_attention.config import StemConfig
from stem_attention.selection import BlockSelection


@dataclass(frozen=True)
class Request:
    """What a caller needs of a backend."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    block_size: int


class Backend(Protocol):
    """Runs the method. Arguments arrive checked; tensors are ``(batch, length, heads, dim)`` with any outer strides."""

    @property
    def name(self) -> str:
        """Name to pass as ``backend=``."""
        ...

    def supports(self, request: Request) -> str | None:
        """None when the backend can serve ``request``, else the reason why not, as a clause."""
        ...

    def select(self, q: Tensor, k: Tensor, v: Tensor, config: StemConfig, scale: float, prompt_len: int) -> BlockSelection:
        """Choose the blocks that ``config`` keeps."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float) -> tuple[Tensor, Tensor]:
        """Exact attention over the kept blocks.

        Returns:
            ``(out, lse)``: ``(batch, q_len, q_heads, dim)`` in the dtype of ``q``, and the natural log-sum-exp of the
            scaled scores, fp32 ``(batch, q_heads, q_len)``.
        """
        ...
