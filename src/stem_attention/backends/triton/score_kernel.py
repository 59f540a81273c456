"""Block scores: one block-level product of inner length stride * head_dim, plus the value term.

Tile: ``BM`` query blocks by ``BN`` key blocks of one query head; tiles after the diagonal are skipped. The operands come
as high and low bf16 parts: three products on the matrix units give nearly fp32 precision.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stem_attention.backends.triton.geometry import key_span, query_span


@triton.jit
def _tile(base, rows, limit, inner, WIDTH: tl.constexpr, BK: tl.constexpr):
    at = inner + tl.arange(0, BK)
    mask = (rows < limit)[:, None]
    if WIDTH % BK:
        mask = mask & (at < WIDTH)[None, :]
    return tl.load(base + rows[:, None] * WIDTH + at, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["q_len", "kv_len", "first_row", "rows", "blocks"])
def score_kernel(
    q_high, q_low, k_high, k_low, value, scores, cu_q, cu_k, q_len, kv_len, first_row, rows, blocks, columns, scale,
    B: tl.constexpr, R: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    WIDTH: tl.constexpr, SPLIT: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Write ``scores[z, head, row, column]``, float32, for columns up to the diagonal; others are left as they are.

    ``first_row`` counts from each sequence's first query block; ``rows`` are scored in this launch. ``value`` is
    ``beta * magnitude (z, kv_head, blocks)``.
    """
    row_tiles = tl.cdiv(rows, BM)
    tile, head, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row0, column0 = (tile % row_tiles) * BM, (tile // row_tiles) * BN
    _, q_len = query_span(z, cu_q, q_len, RAGGED)
    _, kv_len = key_span(z, cu_k, kv_len, RAGGED)
    start = kv_len - q_len
    block0 = start // B + first_row + row0
    if (column0 > block0 + BM - 1) | (block0 * B >= kv_len) | (q_len <= 0):
        return
    heads = tl.num_programs(1)
    at_q = (z.to(tl.int64) * heads + head) * rows
    at_k = (z.to(tl.int64) * (heads // G) + head // G) * blocks
    m = row0 + tl.arange(0, BM)
    n = column0 + tl.arange(0, BN)
    acc = tl.zeros([BM, BN], tl.float32)
    for inner in range(0, WIDTH, BK):
        qh = _tile(q_high + at_q * WIDTH, m, rows, inner, WIDTH, BK)
        kh = _tile(k_high + at_k * WIDTH, n, blocks, inner, WIDTH, BK)
        if SPLIT:
            ql = _tile(q_low + at_q * WIDTH, m, rows, inner, WIDTH, BK)
            kl = _tile(k_low + at_k * WIDTH, n, blocks, inner, WIDTH, BK)
            acc = tl.dot(ql, kh.T, acc)
            acc = tl.dot(qh, kl.T, acc)
            acc = tl.dot(qh, kh.T, acc)
        else:
            acc = tl.dot(qh, kh.T, acc, input_precision="ieee")
    block = block0 + tl.arange(0, BM)
    present = tl.minimum((block + 1) * B, kv_len) - tl.maximum(block * B, start)
    acc = acc * (scale / (tl.maximum(present, 1) * R).to(tl.float32))[:, None]
    acc += tl.load(value + at_k + n, mask=n < blocks, other=0.0)[None, :]
    target = scores + (at_q + m)[:, None] * columns + n[None, :]
    tl.store(target, acc, mask=(m < rows)[:, None] & (n[None, :] <= block[:, None]) & (n < columns)[None, :])
