"""Describe where a call's tensors lie, as the kernels take it: worked out once a call, for selection and attention alike."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stem_attention.backends.triton.program import Launches
from stem_attention.blocks import BlockGrid, block_count, most_rows
from stem_attention.call import Call

LEAST_BOX = 32  # keys of a page that the copy engine fetches at once: with 16, packing them first is faster
WORKSPACE_BYTES = 128 << 20
"""Bytes that one run of query blocks may take in a selection."""


@dataclass(frozen=True)
class Layout:
    """Sizes and strides of a batch: rectangular, with one length for all, or packed, with borders on the device.

    Where lengths differ ``first``, ``q_len`` and ``kv_len`` are 0; without borders, a table or pages theirs are None or 0.
    """

    batch: int  # sequences
    heads: int
    kv_heads: int
    dim: int  # of queries and keys
    value_dim: int
    rows: int  # most query blocks of a sequence
    blocks: int  # most key blocks of a sequence
    first: int  # absolute query block of the first row
    q_len: int
    kv_len: int
    cu_q: Tensor | None  # int32 (batch + 1,), where the queries of each sequence start
    cu_k: Tensor | None
    page_table: Tensor | None  # int32 (batch, max_pages)
    page: int  # tokens of a page
    q_strides: tuple[int, ...]  # by sequence, token and head; the first is 0 where they are packed
    k_strides: tuple[int, ...]  # likewise, or by page, slot and head
    v_strides: tuple[int, ...]

    @classmethod
    def of(cls, call: Call, block_size: int, launches: Launches) -> Layout:
        """Build for blocks of ``block_size``; ``launches`` learns what tables of the batch kernels read."""
        q, k, batch = call.q, call.k, call.batch
        (heads, dim), (kv_heads, value_dim) = q.shape[-2:], call.v.shape[-2:]
        strides = [(0, *s[:2]) if len(s) == 3 else s[:3] for s in (x.stride() for x in (q, k, call.v))]
        if batch is None:
            grid = BlockGrid.of(q, k, block_size)
            sizes = (
                q.shape[0],
                heads,
                kv_heads,
                dim,
                value_dim,
                grid.rows,
                grid.key_blocks,
                grid.first_row,
                grid.q_len,
                grid.kv_len,
            )
            return cls(*sizes, None, None, None, 0, *strides)
        rows = most_rows(batch.max_q, block_size)
        page = k.shape[1] if batch.page_table is not None else 0
        tables = (batch.cu_q, batch.cu_k, batch.page_table)
        launches.keep(*tables)
        blocks = block_count(batch.max_k, block_size)
        sizes = (batch.sequences, heads, kv_heads, dim, value_dim, rows, blocks, 0, 0, 0)
        return cls(*sizes, *tables, page, *strides)

    @property
    def packed(self) -> bool:
        """Tell whether sequences lie one after the other and have lengths of their own."""
        return self.cu_q is not None

    def rows_at_once(self, row_bytes: int, tile_rows: int) -> int:
        """Return how many query blocks are selected for in a run: all, or the whole tiles that there is room for."""
        step = WORKSPACE_BYTES // (self.batch * self.heads * row_bytes)
        return self.rows if step >= self.rows else max(1, step // tile_rows * tile_rows or step)

    @property
    def table_stride(self) -> int:
        """Elements between two lines of the page table."""
        return self.page_table.stride(0) if self.page_table is not None else 0

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return self.heads // self.kv_heads


def describable(x: Tensor) -> bool:
    """Tell whether a tensor descriptor can address ``x``: 16-byte aligned address and strides, none of them 0."""
    aligned = all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
    return aligned and x.data_ptr() % 16 == 0 and x.stride(-1) == 1
