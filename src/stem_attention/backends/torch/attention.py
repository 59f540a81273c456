"""Block-sparse attention by gathering: a product per query block and head over just the blocks that it keeps.

Keys and values are laid out block by block, so that a kept block is one contiguous run to gather. On a CPU a few query blocks
of one kv head's query heads are a unit of work for one thread, and every product inside runs on that thread alone: products
that share the cores among them wait for the slowest core each time, which on a busy machine costs several times their work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby, product

import torch
from torch import Tensor

from stem_attention.backends.torch.workers import run_all
from stem_attention.blocks import block_count
from stem_attention.policies.metric import accumulator_dtype
from stem_attention.selection import BlockSelection

# Scores that one product may hold, in elements (16 MiB in fp32); a single head's row may need more.
_WORKSPACE = 1 << 22
# Query blocks of a unit. Bits do not depend on it: a row of a head is always a product of its own.
_ROWS_PER_UNIT = 4


class _Scratch:
    """Buffers that all rows of a unit share. A fresh one for every row costs more in page faults than the products."""

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
    dtype, (batch, q_len, q_heads, _), size, grid = accumulator_dtype(q), q.shape, selection.block_size, selection.grid
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, q_heads, q_len) if return_lse else 0, dtype=torch.float32, device=q.device)
    keys, values = (_blocks(x, size, dtype) for x in (k, v))  # [batch, kv_heads, blocks, block_size, dim]
    counts, group = selection.counts.tolist(), q_heads // k.shape[2]
    future = torch.ones((size, size), dtype=torch.bool, device=q.device).triu(1)
    together = 1 if q.device.type == "cpu" else group

    def attend_rows(unit: tuple[range, int, int]) -> None:
        """Fill the rows of the query heads of one kv head."""
        (rows, b, g), scratch = unit, _Scratch(keys)
        for row in rows:
            low, high = grid.row_positions(grid.first_row + row)
            queries, hidden = slice(low - grid.start, high - grid.start), future[low % size :][: high - low]
            for heads, count in _equal_heads(counts[b], row, g * group, group, size, together):
                scaled = q[b, queries, heads].transpose(0, 1).to(dtype) * scale
                ids, everything = selection.indices[b, heads, row, :count], count == grid.first_row + row + 1
                result, norm = _attend_row(scaled, keys[b, g], values[b, g], ids, everything, hidden, scratch, return_lse)
                out[b, queries, heads] = result.transpose(0, 1)
                if norm is not None:
                    lse[b, heads, queries] = norm

    runs = [range(first, min(first + _ROWS_PER_UNIT, grid.rows)) for first in range(0, grid.rows, _ROWS_PER_UNIT)]
    # The last rows have the most to do: they begin first, so that no thread is left with one of them at the end.
    run_all(attend_rows, list(product(reversed(runs), range(batch), range(k.shape[2]))), q.device)
    return out, lse


def _blocks(x: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Copy ``(batch, length, heads, dim)`` into whole blocks ``(batch, heads, blocks, size, dim)``, zeros behind the end."""
    batch, length, heads, dim = x.shape
    blocks = torch.empty((batch, heads, block_count(length, size), size, dim), dtype=dtype, device=x.device)
    flat = blocks.flatten(2, 3)
    flat[:, :, :length] = x.transpose(1, 2)
    flat[:, :, length:] = 0
    return blocks


def _equal_heads(
    counts: list[list[int]], row: int, first: int, group: int, size: int, together: int
) -> Iterator[tuple[slice, int]]:
    """Split the ``group`` query heads of one kv head, numbered from ``first``, into runs that keep equally many blocks.

    A run has at most ``together`` heads. Scores are written, normalised and read again: on a CPU those of one head stay in its
    cache (one thread, N = 32K, D = 64: 63 GFLOP/s with one head at a time, 49 with four).
    """
    for count, run in groupby(range(first, first + group), key=lambda head: counts[head][row]):
        members = list(run)
        end, step = members[-1] + 1, max(1, min(together, _WORKSPACE // (count * size * size)))
        for head in range(members[0], end, step):
            yield slice(head, min(head + step, end)), count


def _attend_row(
    q: Tensor, keys: Tensor, values: Tensor, ids: Tensor, everything: bool, hidden: Tensor, scratch: _Scratch, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention of the scaled queries ``(heads, rows, dim)`` of one block over the blocks ``ids (heads, n)``.

    ``hidden (rows, size)`` marks the keys of the diagonal block that come after each query.
    """
    (heads, count), (_, size, dim) = ids.shape, keys.shape
    if everything:  # no need to gather
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
