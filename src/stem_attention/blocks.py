"""Blocks on absolute positions: which query blocks a call has, and how many key blocks they see."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


def block_count(length: int, block_size: int) -> int:
    """Count the blocks that ``length`` tokens touch: ``ceil(length / block_size)``."""
    return -(-length // block_size)


def most_rows(q_len: int, block_size: int) -> int:
    """Count the query blocks that ``q_len`` queries touch at most, wherever inside a block the first one lies."""
    return block_count(q_len - 1, block_size) + 1 if q_len else 0


@dataclass(frozen=True)
class BlockGrid:
    """Queries at the end of a sequence, cut into blocks: rows of query blocks, columns of key blocks.

    Block ``J`` holds positions ``[J * block_size, (J + 1) * block_size)``, for queries and keys alike. Queries are the last
    ``q_len`` of ``kv_len`` positions, so the first row may begin, and the last one end, inside its block.

    Attributes:
        q_len: Query tokens.
        kv_len: Key tokens, ``>= q_len``.
        block_size: Tokens per block.
    """

    q_len: int
    kv_len: int
    block_size: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, block_size: int) -> BlockGrid:
        """Build from ``(batch, length, heads, dim)`` queries and keys."""
        return cls(q.shape[1], k.shape[1], block_size)

    @property
    def start(self) -> int:
        """Position of the first query."""
        return self.kv_len - self.q_len

    @property
    def first_row(self) -> int:
        """Block of the first query."""
        return self.start // self.block_size

    @property
    def end_row(self) -> int:
        """One past the block of the last query."""
        return self.key_blocks if self.q_len else self.first_row

    @property
    def rows(self) -> int:
        """Query blocks that hold a query."""
        return self.end_row - self.first_row

    @property
    def key_blocks(self) -> int:
        """Key blocks, the last one possibly partial."""
        return block_count(self.kv_len, self.block_size)

    @property
    def causal_pairs(self) -> int:
        """Pairs of a query block and a key block that dense causal attention reads, for one head."""
        return self.rows * self.first_row + self.rows * (self.rows + 1) // 2

    def row_positions(self, row: int) -> tuple[int, int]:
        """First and one-past-last position of the queries of the absolute block ``row``."""
        first = row * self.block_size
        return max(first, self.start), min(first + self.block_size, self.kv_len)

    def query_slice(self, first_row: int, end_row: int) -> slice:
        """Describe where the queries of the absolute blocks ``first_row`` to ``end_row`` lie among the queries."""
        return slice(self.row_positions(first_row)[0] - self.start, self.row_positions(end_row - 1)[1] - self.start)
