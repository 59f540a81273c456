"""Kept pairs of blocks between the passes: from a selection's lists to bits, and from bits to lists both ways.

Lists are in the order of their numbers whatever ran first: each place is a count of the bits before it, so every run makes the
same. ``rows_kernel`` lists the key blocks of each row, ``columns_kernel`` the rows of each key block; both count first, and
fill when it is known where each list begins.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stem_attention.backends.triton.geometry import key_span, query_span


@triton.jit(do_not_specialize=["q_len", "kv_len", "rows", "width", "words"])
def pack_kernel(
    indices, counts, kept, cu_q, cu_k, kept_stride_b, kept_stride_h, q_len, kv_len, heads, rows, width, words,
    B: tl.constexpr, TILE: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Set the bits of one row, which are 0 before. A row whose count is its diagonal block + 1 needs no list."""
    pid, z = tl.program_id(0), tl.program_id(1)
    head, row = pid // rows, pid % rows
    _, q_len = query_span(z, cu_q, q_len, RAGGED)
    _, kv_len = key_span(z, cu_k, kv_len, RAGGED)
    block = (kv_len - q_len) // B + row
    if (q_len <= 0) | (block * B >= kv_len):
        return
    at = (z.to(tl.int64) * heads + head) * rows + row
    own = kept + z.to(tl.int64) * kept_stride_b + head.to(tl.int64) * kept_stride_h + row.to(tl.int64) * words
    # Nothing on the device has validated the selection: whatever it holds, reads and writes stay inside.
    count = tl.load(counts + at)
    if count > block:
        for first in range(0, words, TILE):
            word = first + tl.arange(0, TILE)
            ones = tl.minimum(tl.maximum(block + 1 - word * 32, 0), 32)
            tl.store(own + word, tl.where(ones == 32, -1, (1 << (ones & 31)) - 1), mask=word < words)
    else:
        count = tl.minimum(count, width)
        for first in range(0, count, TILE):
            entry = first + tl.arange(0, TILE)
            block_id = tl.load(indices + at * width + entry, mask=entry < count, other=0)
            block_id = tl.minimum(tl.maximum(block_id, 0), block)
            tl.atomic_or(own + block_id // 32, 1 << (block_id & 31), mask=entry < count, sem="relaxed")


@triton.jit(do_not_specialize=["rows", "blocks", "words"])
def rows_kernel(
    kept, starts, lists, kept_stride_b, kept_stride_h, heads, rows, blocks, words, TILE: tl.constexpr, FILL: tl.constexpr
):
    """Count what one row keeps, into ``starts``; or list it from where ``starts`` says."""
    pid, z = tl.program_id(0), tl.program_id(1)
    head, row = pid // rows, pid % rows
    own = kept + z.to(tl.int64) * kept_stride_b + head.to(tl.int64) * kept_stride_h + row.to(tl.int64) * words
    at = (z.to(tl.int64) * heads + head) * rows + row
    place = tl.load(starts + at) if FILL else 0
    for first in range(0, blocks, TILE):
        column = first + tl.arange(0, TILE)
        bit = (tl.load(own + column // 32, mask=column < blocks, other=0) >> (column & 31)) & 1  # [TILE]
        if FILL:
            tl.store(lists + place + tl.cumsum(bit, 0) - 1, column, mask=bit != 0)
        place += tl.sum(bit, 0)
    if not FILL:
        tl.store(starts + at, place)


@triton.jit(do_not_specialize=["rows", "blocks", "words"])
def columns_kernel(
    kept, starts, lists, kept_stride_b, kept_stride_h, heads, rows, blocks, words,
    G: tl.constexpr, TILE: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """The same for 32 key blocks of one query head; ``starts`` is ``(sequences, kv_heads, blocks, G)``.

    So a key block's lists follow one another, those of all query heads that share it. An entry is the query head's place in its
    group times ``rows``, plus the row.
    """
    word, head, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    own = kept + z.to(tl.int64) * kept_stride_b + head.to(tl.int64) * kept_stride_h + word
    lane = tl.arange(0, 32)
    column = word * 32 + lane
    at = ((z.to(tl.int64) * (heads // G) + head // G) * blocks + column) * G + head % G
    place = tl.load(starts + at, mask=column < blocks, other=0) if FILL else tl.zeros([32], tl.int32)
    for first in range(0, rows, TILE):
        row = first + tl.arange(0, TILE)
        bits = tl.load(own + row.to(tl.int64) * words, mask=row < rows, other=0)
        bit = (bits[:, None] >> lane[None, :]) & 1  # [TILE, 32]
        if FILL:
            entry = tl.zeros([TILE, 32], tl.int32) + ((head % G) * rows + row)[:, None]
            tl.store(lists + place[None, :] + tl.cumsum(bit, 0) - 1, entry, mask=bit != 0)
        place += tl.sum(bit, 0)
    if not FILL:
        tl.store(starts + at, place, mask=column < blocks)
