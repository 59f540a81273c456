"""The gradient of block-sparse attention by gathering, as :mod:`stem_attention.backends.torch.attention` computes it."""

from itertools import product

import torch
from torch import Tensor

from stem_attention.backends.torch.attention import query_units
from stem_attention.call import Call
from stem_attention.policies.metric import accumulator_dtype, runs
from stem_attention.selection import BlockSelection


def gradients(
    call: Call, selection: BlockSelection, lse: Tensor, d_out: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; fp64 inputs are computed in fp64, all others in fp32.

    Memory grows with the kept pairs of one unit of query blocks, never with the square of the length.

    Args:
        call: The call, which is not packed.
        selection: The kept blocks.
        lse: ``(batch, q_heads, q_len)``; weights are ``exp(scores - lse)``, whatever else it counts.
        d_out: The gradient of the output, like it.
        delta: ``(batch, q_heads, q_len)``, of :func:`row_sums`.
    """
    (q, k, v), scale, softcap = (call.q, call.k, call.v), call.scale, call.softcap
    heads, kv_heads, dtype = q.shape[2], k.shape[2], accumulator_dtype(q)
    grid, size = selection.grid, selection.block_size
    before = grid.start % size
    future = torch.ones((size, size), dtype=torch.bool, device=q.device).triu(1)
    d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    counts, order = torch.unflatten(selection.counts, 1, (kv_heads, -1)).flatten(2).sort(descending=True, stable=True)
    lengths = counts.tolist()

    def blocks(x: Tensor, start: int) -> Tensor:
        """``(length, heads, dim)`` as whole blocks ``(heads * blocks, size, dim)``; absent tokens are zero."""
        return runs(x[None], start, size, size)[0].permute(2, 0, 1, 3).flatten(0, 1).to(dtype)

    for b, g in product(range(q.shape[0]), range(kv_heads)):
        own = slice(g * heads // kv_heads, (g + 1) * heads // kv_heads)
        queries, d_results = blocks(q[b, :, own], grid.start), blocks(d_out[b, :, own], grid.start)
        norms, deltas = (blocks(x[b, own].T[..., None], grid.start) for x in (lse, delta))
        keys, values = blocks(k[b, :, g, None], 0), blocks(v[b, :, g, None], 0)
        d_queries, d_keys, d_values = (torch.zeros_like(x) for x in (queries, keys, values))
        lists = selection.indices[b, own].flatten(0, 1)[order[b, g]]
        for unit, count in query_units(lengths[b][g], size, keys.shape[2] + values.shape[2]):
            rows, ids = order[b, g, unit], lists[unit, :count].flatten()
            kept_k, kept_v = (x[ids].view(len(rows), count * size, -1) for x in (keys, values))
            scores, bend = (queries[rows] @ kept_k.mT).mul_(scale), None
            if softcap is not None:
                bounded = scores.div_(softcap).tanh_()
                scores, bend = bounded * softcap, bounded.square_().neg_().add_(1)
            scores = scores.sub_(norms[rows])
            scores[..., -size:].masked_fill_(future, -torch.inf)  # the last block that a row keeps is its own
            weights = scores.exp_()
            d_scores = (d_results[rows] @ kept_v.mT).sub_(deltas[rows]).mul_(weights)
            if bend is not None:
                d_scores.mul_(bend)
            d_queries.index_copy_(0, rows, (d_scores @ kept_k).mul_(scale))
            _add(d_keys, ids, (d_scores.mT @ queries[rows]).mul_(scale))
            _add(d_values, ids, weights.mT @ d_results[rows])
        inside = slice(before, before + grid.q_len)
        d_q[b, :, own] = (
            torch.unflatten(d_queries, 0, (own.stop - own.start, -1)).flatten(1, 2)[:, inside].transpose(0, 1).to(q.dtype)
        )
        d_k[b, :, g] = d_keys.flatten(0, 1)[: grid.kv_len].to(k.dtype)
        d_v[b, :, g] = d_values.flatten(0, 1)[: grid.kv_len].to(v.dtype)
    return d_q, d_k, d_v


def row_sums(out: Tensor, d_out: Tensor, d_lse: Tensor) -> Tensor:
    """Return ``sum(d_out * out) - d_lse`` of every row and head, like ``d_lse``; in fp64 for fp64, else in fp32."""
    dtype = accumulator_dtype(out)
    return (out.to(dtype) * d_out.to(dtype)).sum(-1).transpose(-1, -2) - d_lse


def _add(blocks: Tensor, ids: Tensor, parts: Tensor) -> None:
    """Add gathered blocks to where they came from, in the same order every time: each device has one way that does."""
    parts = parts.view(len(ids), *blocks.shape[1:])
    if blocks.device.type == "cpu":
        blocks.index_add_(0, ids, parts)
    else:
        blocks.index_put_((ids,), parts, accumulate=True)
