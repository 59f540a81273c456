"""What a backend is: something that selects blocks and runs attention over a selection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from stem_attention.backends.dense import dense_attention
from stem_attention.config import StemConfig
from stem_attention.policies.dense import keep_everything
from stem_attention.selection import BlockSelection


@dataclass(frozen=True)
class Request:
    """What a caller needs of a backend."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    block_size: int

    @classmethod
    def of(cls, q: Tensor, block_size: int) -> Request:
        """What a call with these queries, ``(..., heads, dim)``, needs."""
        return cls(q.device, q.dtype, q.shape[-1], block_size)


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a packed batch start: queries and keys, each list ending with the total."""

    q_starts: Sequence[int]
    k_starts: Sequence[int]


class Backend(ABC):
    """Runs the method. Arguments arrive checked; tensors are ``(batch, length, heads, dim)`` with any outer strides."""

    name: str
    """Name to pass as ``backend=``."""

    crossover: int = 4096
    """Prompt length from which it was measured to beat dense attention (here: the torch backend on two CPU cores)."""

    caveat: str = ""
    """What else of a call, which a :class:`Request` does not show, decides how it runs, as a clause."""

    @abstractmethod
    def supports(self, request: Request) -> str | None:
        """None when the backend can serve ``request``, else the reason why not, as a clause."""

    @abstractmethod
    def select(self, q: Tensor, k: Tensor, v: Tensor, config: StemConfig, scale: float, prompt_len: int) -> BlockSelection:
        """Choose the blocks that ``config`` keeps."""

    @abstractmethod
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float, return_lse: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Exact attention over the kept blocks.

        Returns:
            ``(out, lse)``: ``(batch, q_len, q_heads, dim)`` in the dtype of ``q``, and the natural log-sum-exp of the
            scaled scores, fp32 ``(batch, q_heads, q_len)``, or an empty tensor unless ``return_lse``.
        """

    def dense_limit(self, config: StemConfig) -> int:
        """Prompts of fewer tokens run dense."""
        return self.crossover if config.dense_below is None else config.dense_below

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, config: StemConfig, scale: float, prompt_len: int, return_lse: bool
    ) -> tuple[Tensor, Tensor]:
        """Select and attend, or attend densely where the prompt is too short to gain. Returns as :meth:`attend`."""
        short = prompt_len < self.dense_limit(config)
        if short and not return_lse:
            return dense_attention(q, k, v, scale), q.new_empty(0, dtype=torch.float32)
        selection = keep_everything(q, k, config.block_size) if short else self.select(q, k, v, config, scale, prompt_len)
        return self.attend(q, k, v, selection, scale, return_lse)

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
        """:meth:`forward` for ``(total, heads, dim)`` tensors, here one sequence at a time.

        With ``page_table``, int32 ``(sequences, max_pages)``, keys lie in a cache ``(pages, page_size, kv_heads, dim)``.
        The log-sum-exp is ``(q_heads, total_q)``.
        """
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = q.new_empty((q.shape[1], q.shape[0]) if return_lse else 0, dtype=torch.float32)
        for i, (low, high) in enumerate(pairwise(packing.q_starts)):
            if low == high:
                continue
            keys, values = (_sequence(x, i, packing.k_starts, page_table)[None] for x in (k, v))
            part, norm = self.forward(q[None, low:high], keys, values, config, scale, prompt_lens[i], return_lse)
            out[low:high] = part[0]
            if return_lse:
                lse[:, low:high] = norm[0]
        return out, lse


def _sequence(x: Tensor, i: int, starts: Sequence[int], page_table: Tensor | None) -> Tensor:
    """Keys or values of one sequence, ``(length, kv_heads, head_dim)``."""
    if page_table is None:
        return x[starts[i] : starts[i + 1]]
    length = starts[i + 1] - starts[i]
    return x[page_table[i, : -(-length // x.shape[1])].long()].flatten(0, 1)[:length]
