"""Keep by mass, as written in docs/mass.md and independent of the fast path: one pool, one row, one head at a time."""

import math

import torch
from torch import Tensor

from stem_attention.policies.mass import Mass
from stem_attention.policies.metric import accumulator_dtype
from stem_attention.selection import BlockSelection


def select_by_mass(
    q: Tensor, k: Tensor, v: Tensor, policy: Mass, scale: float, prompt_len: int, softcap: float | None = None
) -> BlockSelection:
    """Choose blocks row by row; values do not matter. fp64 inputs are estimated in fp64, all others in fp32."""
    batch, q_len, q_heads, _ = q.shape
    kv_len, group, size = k.shape[1], q.shape[2] // k.shape[2], policy.block_size
    rows = range((kv_len - q_len) // size, math.ceil(kv_len / size)) if q_len else range(0)
    lists = [
        [
            [keep_row(q[b, :, h], k[b, :, h // group], h, row, policy, scale, prompt_len, softcap) for row in rows]
            for h in range(q_heads)
        ]
        for b in range(batch)
    ]
    return BlockSelection.from_lists(lists, block_size=size, q_len=q_len, kv_len=kv_len, device=q.device)


def keep_row(
    q: Tensor, k: Tensor, head: int, row: int, policy: Mass, scale: float, prompt_len: int, softcap: float | None
) -> list[int]:
    """List the ids that one query block of a head keeps."""
    num_blocks = math.ceil(prompt_len / policy.block_size)
    if row >= num_blocks - policy.tail_blocks:
        return list(range(row + 1))
    forced = [j < policy.sink_blocks or j > row - policy.local_blocks for j in range(row + 1)]
    kept = (~(row_masses(q, k, row, policy, scale, softcap) < policy.head_share(head) / num_blocks)).tolist()
    return [j for j in range(row + 1) if forced[j] or kept[j]]


def row_masses(q: Tensor, k: Tensor, row: int, policy: Mass, scale: float, softcap: float | None = None) -> Tensor:
    """Estimate what a query block of one head gives to each of its ``row + 1`` key blocks: the most of any pool of its queries.

    ``q (q_len, dim)`` are the last of the positions of ``k (kv_len, dim)``, and ``row`` counts blocks from position 0.
    """
    size, start = policy.block_size, len(k) - len(q)
    keys = k[: (row + 1) * size]
    pools = [x.to(accumulator_dtype(x)) for x in torch.split(keys, policy.key_pool)]
    means, counts = torch.stack([x.mean(0).to(k.dtype) for x in pools]), [len(x) for x in pools]
    variances = torch.stack([x.var(0, correction=0) for x in pools])
    most = torch.zeros(row + 1, dtype=accumulator_dtype(q), device=q.device)
    for first in range(row * size, (row + 1) * size, policy.query_pool):
        low, high = max(first, start), min(first + policy.query_pool, len(k))
        if low < high:
            query = q[low - start : high - start].to(most.dtype).mean(0).to(q.dtype)
            seen = estimated_attention(query, means, variances, counts, high - 1, policy, scale, softcap)
            most = torch.maximum(most, seen)
    return most


def estimated_attention(
    query: Tensor,
    means: Tensor,
    variances: Tensor,
    counts: list[int],
    last: int,
    policy: Mass,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Estimate the share that each key block may have in the attention of a pooled query whose last position is ``last``.

    A pool of keys counts as many times as it has keys; pools that begin after ``last`` lie in the query's future. The whole
    is what the means say; a block's part of it is what it would be with scores ``spread`` standard deviations above them. A
    soft cap bounds both.
    """
    dtype = accumulator_dtype(query)
    scores, sizes = scale * (means.to(dtype) @ query.to(dtype)), torch.tensor(counts, dtype=dtype, device=query.device)
    higher = scores + policy.spread * (scale * (variances @ query.to(dtype).square()).sqrt()).abs()
    if softcap is not None:
        scores, higher = softcap * (scores / softcap).tanh(), softcap * (higher / softcap).tanh()
    seen = torch.arange(len(counts), device=query.device) <= last // policy.key_pool
    whole = (scores + sizes.log())[seen].logsumexp(0)
    weights = (higher + sizes.log() - whole).exp() * seen
    return torch.stack([part.sum() for part in torch.split(weights, policy.block_size // policy.key_pool)])
