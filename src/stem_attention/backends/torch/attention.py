"""Block-sparse attention by gathering: a batched product over just the blocks that query blocks keep.

Query blocks that keep equally many are computed together, whichever heads they belong to: what they gather has one shape, and a
few large products take less time than many small ones. On a CPU such a unit is work for one thread, and every product inside
runs on that thread alone: products that share the cores among them wait for the slowest core each time, which on a busy machine
costs several times their work.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby, product

import torch
from torch import Tensor

from stem_attention.backends.torch.workers import run_all
from stem_attention.blocks import BlockGrid
from stem_attention.call import Call
from stem_attention.policies.metric import accumulator_dtype, runs
from stem_attention.selection import BlockSelection

# Elements of gathered keys, values and scores that a unit holds; one query block alone may need more. Small units wait for
# Python, large ones leave the cache: of 2^17 to 2^22, these took least (two threads of a Xeon, 8K and 32K tokens).
_WORKSPACE = 1 << 21


class _Scratch(threading.local):
    """Buffers that each thread keeps through a call. A fresh one for every unit costs more in page faults than its products."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._flat: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """A view of the named buffer, uninitialised; the previous view of that name is lost."""
        size = math.prod(shape)
        if name not in self._flat or self._flat[name].numel() < size:
            self._flat[name] = self._like.new_empty(size)
        return self._flat[name][:size].view(shape)


def attend(call: Call, selection: BlockSelection) -> tuple[Tensor, Tensor]:
    """Return ``(out, lse)``, ``lse`` empty unless asked for; fp64 inputs are computed in fp64, all others in fp32."""
    (batch, _, heads, _), kv_heads, (out, lse) = call.q.shape, call.k.shape[2], call.empty_results()
    # The longest lists first, so that no thread is left with one of them at the end.
    counts, order = torch.unflatten(selection.counts, 1, (kv_heads, -1)).flatten(2).sort(descending=True, stable=True)
    lengths = counts.tolist()
    # One kv head after the other: what is laid out anew is small beside q, k and v.
    for b, g in product(range(batch), range(kv_heads)):
        own = slice(g * heads // kv_heads, (g + 1) * heads // kv_heads)
        lists = selection.indices[b, own].flatten(0, 1)[order[b, g]]
        k, v = (x[b : b + 1, :, g : g + 1] for x in (call.k, call.v))
        part = replace(call, q=call.q[b : b + 1, :, own], k=k, v=v, sinks=None if call.sinks is None else call.sinks[own])
        results = out[b, :, own], lse[b, own] if call.return_lse else None
        _attend_group(part, *results, order[b, g], lists, lengths[b][g], selection.grid)
    return out, lse


def _attend_group(
    call: Call, out: Tensor, lse: Tensor | None, order: Tensor, lists: Tensor, counts: list[int], grid: BlockGrid
) -> None:
    """Fill ``out (q_len, heads, dim)`` and ``lse (heads, q_len)`` for a call of the query heads of one kv head of a sequence.

    ``order`` numbers the query blocks of all these heads by how many key blocks they keep, the most first; ``lists`` and
    ``counts`` are in that order.
    """
    q, sinks, softcap, window, dtype = call.q, call.sinks, call.softcap, call.window, accumulator_dtype(call.q)
    size, heads, before = grid.block_size, q.shape[2], grid.start % grid.block_size
    blocks = runs(q, grid.start, size, size)[0].permute(2, 0, 1, 3)
    queries = torch.empty(blocks.shape, dtype=dtype, device=q.device).copy_(blocks).mul_(call.scale).flatten(0, 1)
    # [blocks, size, dim]: a kept one is one run.
    keys, values = (runs(x, 0, size, size)[0, :, :, 0].to(dtype).contiguous() for x in (call.k, call.v))
    results = queries.new_empty((*queries.shape[:2], values.shape[2]))
    norms = None if lse is None and sinks is None else queries.new_empty(queries.shape[:2])
    future = torch.ones((size, size), dtype=torch.bool, device=q.device).triu(1)
    inside_block = torch.arange(size, device=q.device)
    apart = inside_block[:, None, None] - inside_block  # [query, 1, key]
    scratch = _Scratch(keys)

    def attend_unit(unit: tuple[slice, int]) -> None:
        """Fill query blocks that keep ``count`` key blocks each, the last of them their own."""
        rows, count = order[unit[0]], unit[1]
        ids, tokens = lists[unit[0], :count].flatten(), count * size
        kept_k, kept_v = (
            torch.index_select(x, 0, ids, out=scratch.take(name, len(ids), *x.shape[1:])).view(len(rows), tokens, -1)
            for name, x in (("keys", keys), ("values", values))
        )
        scores = torch.bmm(queries[rows], kept_k.mT, out=scratch.take("scores", len(rows), size, tokens))
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        scores[..., -size:].masked_fill_(future, -torch.inf)
        if window is not None:
            of_rows = ids.view(len(rows), count)
            distances = (of_rows[:, -1:] - of_rows)[:, None, :, None] * size + apart  # [row, query, block, key]
            scores.view(distances.shape).masked_fill_(distances >= window, -torch.inf)
        peak = None if norms is None else scores.amax(-1)
        weights = torch.softmax(scores, -1, out=scores)
        results.index_copy_(0, rows, weights @ kept_v)
        if norms is not None and peak is not None:  # the largest weight is exp(peak - lse): no second pass of exponentials
            norms.index_copy_(0, rows, peak - weights.amax(-1).log())

    run_all(attend_unit, list(query_units(counts, size, keys.shape[2] + values.shape[2])), q.device)
    if sinks is not None and norms is not None:
        logits = sinks.to(dtype).repeat_interleave(grid.rows)[:, None]
        results *= torch.sigmoid(norms - logits)[..., None]  # the keys' part of a softmax that the sink takes part in
        norms = torch.logaddexp(norms, logits)
    inside = slice(before, before + grid.q_len)
    out.copy_(torch.unflatten(results, 0, (heads, -1)).flatten(1, 2)[:, inside].transpose(0, 1))
    if lse is not None and norms is not None:
        lse.copy_(torch.unflatten(norms, 0, (heads, -1)).flatten(1, 2)[:, inside])


def query_units(counts: Sequence[int], size: int, dims: int) -> Iterator[tuple[slice, int]]:
    """Split the sorted ``counts`` into runs of equal ones, as many as the workspace has room for.

    A kept block has ``size`` keys and values, of ``dims`` numbers together, and as many scores for each of ``size`` queries.
    """
    first, most = 0, _WORKSPACE // (size * (size + dims))
    for count, run in groupby(counts):
        end, step = first + sum(1 for _ in run), max(1, most // max(count, 1))
        yield from ((slice(at, min(at + step, end)), count) for at in range(first, end, step))
        first = end
