"""Calls cut so that the lists of kept blocks stay small where nobody knows beforehand how long they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from stem_attention.backends.base import Packing
from stem_attention.config import StemConfig
from stem_attention.policies.budget import block_count

LIST_BYTES = 512 << 20
"""Bytes that the lists of one launch may take: 32 heads of a prompt of 131072 tokens in blocks of 64, whatever they keep."""


def runs(q_len: int, kv_len: int, heads: int, config: StemConfig) -> list[tuple[int, int]]:
    """Cut the queries, which are the last ``q_len`` of ``kv_len`` positions, into runs that end on block borders.

    Args:
        q_len: Queries.
        kv_len: Keys.
        heads: Lists of a query block: batch times query heads.
        config: What to keep; with a budget there is one run, since lists are short.

    Returns:
        First and end position of each run.
    """
    size, start = config.block_size, kv_len - q_len
    rows = max(1, LIST_BYTES // (4 * heads * max(1, block_count(kv_len, size)))) if config.keep == "mass" else kv_len
    borders = [start, *range((start // size + rows) * size, kv_len, rows * size), kv_len]
    return list(pairwise(borders))


@dataclass(frozen=True)
class Piece:
    """Some sequences of a packed batch, or a part of one.

    Attributes:
        sequences: First and end.
        queries: First and end among the batch's queries.
        keys: First and end among the batch's keys.
        packing: Borders inside the piece.
    """

    sequences: tuple[int, int]
    queries: tuple[int, int]
    keys: tuple[int, int]
    packing: Packing


def pieces(packing: Packing, heads: int, config: StemConfig) -> list[Piece]:
    """Cut a packed batch: short sequences stay together, a long one is cut as :func:`runs` does."""
    return list(_pieces(packing, heads, config)) if config.keep == "mass" else [_whole(packing, 0, len(packing.q_starts) - 1)]


def _pieces(packing: Packing, heads: int, config: StemConfig) -> Iterator[Piece]:
    size, begin, most_rows, most_blocks = config.block_size, 0, 0, 0
    lengths = [(b - a, d - c) for (a, b), (c, d) in zip(pairwise(packing.q_starts), pairwise(packing.k_starts), strict=True)]
    for i, (q_len, kv_len) in enumerate(lengths):
        most_rows = max(most_rows, block_count(q_len, size) + 1)
        most_blocks = max(most_blocks, block_count(kv_len, size))
        if i > begin and (i + 1 - begin) * most_rows * most_blocks * heads * 4 > LIST_BYTES:
            yield from _cut(packing, begin, i, heads, config)
            begin, most_rows, most_blocks = i, block_count(q_len, size) + 1, block_count(kv_len, size)
    yield from _cut(packing, begin, len(lengths), heads, config)


def _cut(packing: Packing, first: int, end: int, heads: int, config: StemConfig) -> Iterator[Piece]:
    q_from, k_from = packing.q_starts[first], packing.k_starts[first]
    q_len, kv_len = packing.q_starts[end] - q_from, packing.k_starts[end] - k_from
    parts = runs(q_len, kv_len, heads, config) if end - first == 1 else []
    if len(parts) < 2:
        yield _whole(packing, first, end)
        return
    start = kv_len - q_len
    for low, high in parts:
        queries = (q_from + low - start, q_from + high - start)
        yield Piece((first, end), queries, (k_from, k_from + high), Packing([0, high - low], [0, high]))


def _whole(packing: Packing, first: int, end: int) -> Piece:
    q_starts, k_starts = packing.q_starts[first : end + 1], packing.k_starts[first : end + 1]
    inside = Packing([at - q_starts[0] for at in q_starts], [at - k_starts[0] for at in k_starts])
    return Piece((first, end), (q_starts[0], q_starts[-1]), (k_starts[0], k_starts[-1]), inside)
