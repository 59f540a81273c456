"""Block-sparse attention by gathering: one batched product per query block over just the blocks it keeps.

The query heads of one kv head share a copy of its keys and values, laid out block by block, so that a kept block is one
contiguous run to gather. Neighbouring heads that keep equally many blocks of a row go through one batched product. Rows in
which every head keeps everything (the first rows, the dense tail) are left to torch's fused attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain, groupby

import torch
from torch import Tensor

from stem_attention.backends.dense import dense_attention
from stem_attention.policies.metric import accumulator_dtype
from stem_attention.selection import BlockSelection

# Scores that one product may hold, in elements (16 MiB in fp32); a single head's row may need more.
_WORKSPACE = 1 << 22


class _Scratch:
    """Buffers that all rows share. A fresh one for every row costs more in page faults than the products themselves."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._flat: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """A view of the named buffer, uninitialised; the previous view of that name is lost."""
        size = math.prod(shape)
        held = self._flat.get(name)
        if held is None or held.numel() < size:
            self._flat[name] = held = self._like.new_empty(size if held is None else max(size, 2 * held.numel()))
        return held[:size].view(shape)


def attend(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float, return_lse: bool) -> tuple[Tensor, Tensor]:
    """Return ``(out, lse)``, ``lse`` empty unless asked for; fp64 inputs are computed in fp64, all others in fp32."""
    dtype = accumulator_dtype(q)
    (batch, q_len, q_heads, _), kv_heads, size = q.shape, k.shape[2], selection.block_size
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, q_heads, q_len) if return_lse else 0, dtype=torch.float32, device=q.device)
    together = torch.get_num_threads() if q.device.type == "cpu" else q_heads
    future = torch.ones((size, size), dtype=torch.bool, device=q.device).triu(1)
    scratch = _Scratch(q.new_empty(0, dtype=dtype))
    group = q_heads // kv_heads
    counts = torch.unflatten(selection.counts, 1, (kv_heads, group)).tolist()
    for b in range(batch):
        whole = [not return_lse and done for done in _whole_rows(counts[b], selection)]  # fused attention keeps the lse
        entry = slice(b, b + 1)  # one by one: a row's bits never depend on what else is in the batch
        _attend_whole(q[entry], k[entry], v[entry], out[entry], selection, whole, scale)
        left = [row for row, done in enumerate(whole) if not done]
        if not left:
            continue
        for g in range(kv_heads):
            keys, values = (_blocks(x[b, :, g], size, dtype) for x in (k, v))
            for row in left:
                low, high = _positions(selection, row)
                hidden = future[low % size :][: high - low]
                low, high = low - selection.kv_len + q_len, high - selection.kv_len + q_len
                for heads, count in _equal_heads(counts[b][g], row, g * group, size, together):
                    rows = q[b, low:high, heads].transpose(0, 1).to(dtype) * scale
                    ids = selection.indices[b, heads, row, :count]
                    whole_row = count == selection.first_row + row + 1
                    result, norm = _attend_row(rows, keys, values, ids, whole_row, hidden, scratch, return_lse)
                    out[b, low:high, heads] = result.transpose(0, 1)
                    if norm is not None:
                        lse[b, heads, low:high] = norm
    return out, lse


def _whole_rows(counts: list[list[list[int]]], selection: BlockSelection) -> list[bool]:
    """Rows in which every head of one batch entry, ``counts[kv_head][head][row]``, keeps every causal block."""
    heads = list(chain.from_iterable(counts))
    return [all(head[row] > selection.first_row + row for head in heads) for row in range(selection.rows)]


def _attend_whole(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, selection: BlockSelection, whole: list[bool], scale: float
) -> None:
    """Fill the rows of ``out`` that keep everything, neighbouring ones together."""
    dtype = accumulator_dtype(q)
    start = selection.kv_len - selection.q_len
    for is_whole, run in groupby(range(selection.rows), key=whole.__getitem__):
        rows = list(run) if is_whole else []
        if not rows:
            continue
        low, high = _positions(selection, rows[0])[0], _positions(selection, rows[-1])[1]
        # Queries that do not begin at the first key need a mask, which is to stay small.
        step = high - low if low == 0 else max(selection.block_size, 2 * _WORKSPACE // high)
        for first in range(low, high, step):
            end = min(first + step, high)
            queries = slice(first - start, end - start)
            out[:, queries] = dense_attention(q[:, queries].to(dtype), k[:, :end].to(dtype), v[:, :end].to(dtype), scale)


def _blocks(x: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Copy ``(length, dim)`` into whole blocks ``(blocks, size, dim)``; the missing end of the last one is zero."""
    blocks = torch.empty((-(-x.shape[0] // size), size, x.shape[1]), dtype=dtype, device=x.device)
    flat = blocks.view(-1, x.shape[1])
    flat[: x.shape[0]] = x
    flat[x.shape[0] :] = 0
    return blocks


def _positions(selection: BlockSelection, row: int) -> tuple[int, int]:
    """Absolute positions ``[low, high)`` of the queries of a row."""
    first = (selection.first_row + row) * selection.block_size
    return max(first, selection.kv_len - selection.q_len), min(first + selection.block_size, selection.kv_len)


def _equal_heads(counts: list[list[int]], row: int, first: int, size: int, together: int) -> Iterator[tuple[slice, int]]:
    """Split the query heads of one kv head, numbered from ``first``, into runs that keep equally many blocks.

    A run has at most ``together`` heads, one a thread. Scores are written, normalised and read again: then they stay in
    its cache (one thread, N = 32K, D = 64: 63 GFLOP/s with one head at a time, 49 with four).
    """
    for count, run in groupby(range(len(counts)), key=lambda head: counts[head][row]):
        members = list(run)
        end, step = members[-1] + 1, max(1, min(together, _WORKSPACE // (count * size * size)))
        for head in range(members[0], end, step):
            yield slice(first + head, first + min(head + step, end)), count


def _attend_row(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    ids: Tensor,
    whole_row: bool,
    hidden: Tensor,
    scratch: _Scratch,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention of the scaled queries ``(heads, rows, dim)`` of one block over the blocks ``ids (heads, n)``.

    ``hidden (rows, size)`` marks the keys of the diagonal block that come after each query.
    """
    (heads, count), (_, size, dim) = ids.shape, keys.shape
    if whole_row:  # everything is kept: no need to gather
        kept_k, kept_v = (x[:count].view(1, count * size, dim).expand(heads, -1, -1) for x in (keys, values))
    else:
        kept_k, kept_v = (
            torch.index_select(x, 0, ids.flatten(), out=scratch.take(name, heads * count, size, dim)).view(heads, -1, dim)
            for name, x in (("keys", keys), ("values", values))
        )
    scores = torch.bmm(q, kept_k.mT, out=scratch.take("scores", heads, q.shape[1], count * size))
    scores[..., -size:].masked_fill_(hidden, -torch.inf)  # ascending ids: the diagonal block is the last
    peak = scores.amax(-1) if return_lse else None
    weights = torch.softmax(scores, -1, out=scores)
    # The largest weight is exp(peak - lse): it gives the log-sum-exp without a second pass of exponentials.
    return torch.bmm(weights, kept_v), None if peak is None else peak - weights.amax(-1).log()
