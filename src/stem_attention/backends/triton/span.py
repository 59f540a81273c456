"""What part of a batch the selection's kernels look at."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stem_attention.backends.ragged import Ragged
from stem_attention.policies.budget import block_count


@dataclass(frozen=True)
class Span:
    """Sizes and strides of a batch, as the kernels take them."""

    batch: int
    rows: int
    blocks: int
    q_len: int
    kv_len: int
    first: int
    cu_q: Tensor | None
    cu_k: Tensor | None
    q_strides: tuple[int, ...]

    @classmethod
    def of(cls, q: Tensor, k: Tensor, size: int, ragged: Ragged | None, page_table: Tensor | None) -> Span:
        if ragged is None:
            kv_len = k.shape[1] if page_table is None else 0
            first, blocks = (kv_len - q.shape[1]) // size, block_count(kv_len, size)
            rows = blocks - first if q.shape[1] else 0
            return cls(q.shape[0], rows, blocks, q.shape[1], kv_len, first, None, None, q.stride()[:3])
        rows = block_count(ragged.max_q - 1, size) + 1 if ragged.max_q else 0  # a sequence may start inside a block
        blocks = block_count(ragged.max_k, size)
        return cls(ragged.sequences, rows, blocks, 0, 0, 0, ragged.cu_q, ragged.cu_k, (0, *q.stride()[:2]))
