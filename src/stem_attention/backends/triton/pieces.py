"""Calls cut so that the lists of kept blocks stay small where nobody knows beforehand how long they are."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import TypeAlias

from stem_attention.blocks import BlockGrid
from stem_attention.call import Call, PackedBatch

LIST_BYTES = 512 << 20
"""Bytes that the lists of one launch may take: 32 heads of a prompt of 131072 tokens in blocks of 64, whatever they keep."""

Piece: TypeAlias = "tuple[Call, tuple[slice, ...]]"
"""A part of a call, and where its queries lie in the call's; its log-sum-exp lies there too, behind an axis before."""


def pieces(call: Call) -> list[Piece]:
    """Cut a call: short sequences of a packed batch stay together, a long one is cut into runs of query blocks."""
    if call.policy.row_counts(1) is not None:  # lists of a known length are short
        return [(call, ())]
    cut = _runs(call) if call.batch is None else _packed(call, call.batch)
    return cut if len(cut) > 1 else [(call, ())]


def _runs(call: Call) -> list[Piece]:
    start = call.grid.start
    cut: list[Piece] = []
    for low, high in run_borders(call.grid, call.q.shape[0] * call.q.shape[2]):
        own = slice(low - start, high - start)
        cut.append((replace(call, q=call.q[:, own], k=call.k[:, :high], v=call.v[:, :high], out=None), (slice(None), own)))
    return cut


def run_borders(grid: BlockGrid, heads: int) -> list[tuple[int, int]]:
    """Cut queries into runs that end on block borders: first and end position of each. A query block has ``heads`` lists."""
    size = grid.block_size
    rows = max(1, LIST_BYTES // (4 * heads * max(1, grid.key_blocks)))
    borders = [grid.start, *range((grid.first_row + rows) * size, grid.kv_len, rows * size), grid.kv_len]
    return list(pairwise(borders))


_Span: TypeAlias = "tuple[slice, slice, PackedBatch]"  # queries and keys among a batch's, and where sequences lie in these


def _packed(call: Call, batch: PackedBatch) -> list[Piece]:
    heads, size = call.q.shape[1], call.policy.block_size
    # Cut once a step, not once a layer: the parts have borders of their own on the device.
    spans = batch.once(("pieces", heads, size), lambda: list(_spans(batch, heads, size)))
    cut: list[Piece] = []
    for queries, keys, inside in spans:
        k, v = (call.k, call.v) if call.paged else (call.k[keys], call.v[keys])
        cut.append((replace(call, q=call.q[queries], k=k, v=v, batch=inside, out=None), (queries,)))
    return cut


def _spans(batch: PackedBatch, heads: int, size: int) -> Iterator[_Span]:
    begin, most_rows, most_blocks = 0, 0, 0
    for i in range(batch.sequences):
        grid = batch.grid(i, size)
        most_rows, most_blocks = max(most_rows, grid.rows + 1), max(most_blocks, grid.key_blocks)
        if i > begin and (i + 1 - begin) * most_rows * most_blocks * heads * 4 > LIST_BYTES:
            yield from _cut(batch, begin, i, heads, size)
            begin, most_rows, most_blocks = i, grid.rows + 1, grid.key_blocks
    yield from _cut(batch, begin, batch.sequences, heads, size)


def _cut(batch: PackedBatch, first: int, end: int, heads: int, size: int) -> Iterator[_Span]:
    own, q_from, k_from = slice(first, end), batch.q_starts[first], batch.k_starts[first]
    parts = run_borders(batch.grid(first, size), heads) if end - first == 1 else []
    if len(parts) < 2:
        q_starts, k_starts = batch.q_starts[first : end + 1], batch.k_starts[first : end + 1]
        inside = _inside(batch, own, [at - q_from for at in q_starts], [at - k_from for at in k_starts])
        yield slice(q_from, q_starts[-1]), slice(k_from, k_starts[-1]), inside
        return
    start = batch.grid(first, size).start
    for low, high in parts:
        queries = slice(q_from + low - start, q_from + high - start)
        yield queries, slice(k_from, k_from + high), _inside(batch, own, [0, high - low], [0, high])


def _inside(batch: PackedBatch, own: slice, q_starts: list[int], k_starts: list[int]) -> PackedBatch:
    table = None if batch.page_table is None else batch.page_table[own]
    return PackedBatch.of_starts(q_starts, k_starts, batch.prompt_lens[own], table, batch.cu_q.device)
