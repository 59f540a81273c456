"""Sections 3 to 5, as written, and independent of the fast path: no factorisation, no shared budget code."""

import math

import torch
from torch import Tensor

from stem_attention.policies.metric import accumulator_dtype
from stem_attention.policies.stem import Stem
from stem_attention.selection import BlockSelection


def select_by_score(
    q: Tensor, k: Tensor, v: Tensor, policy: Stem, scale: float, prompt_len: int, softcap: float | None = None
) -> BlockSelection:
    """Choose blocks row by row. fp64 inputs are scored in fp64, all others in fp32."""
    batch, q_len, q_heads, _ = q.shape
    kv_len, group, size = k.shape[1], q.shape[2] // k.shape[2], policy.block_size
    num_blocks = math.ceil(prompt_len / size)
    rows = range((kv_len - q_len) // size, math.ceil(kv_len / size)) if q_len else range(0)

    def choose_head(q: Tensor, k: Tensor, v: Tensor) -> list[list[int]]:
        magnitude = policy.beta * block_magnitude(v, policy)
        scores = (block_scores(q, k, row, policy, scale, softcap) + magnitude[: row + 1] for row in rows)
        return [choose_row(of_row, row, num_blocks, policy) for row, of_row in zip(rows, scores, strict=True)]

    lists = [[choose_head(q[b, :, h], k[b, :, h // group], v[b, :, h // group]) for h in range(q_heads)] for b in range(batch)]
    return BlockSelection.from_lists(lists, block_size=size, q_len=q_len, kv_len=kv_len, device=q.device)


def block_scores(q: Tensor, k: Tensor, row: int, policy: Stem, scale: float, softcap: float | None = None) -> Tensor:
    """``route[I, J]`` for ``J <= I``: the mean of the block pair's strided antidiagonals.

    The factorised sum of section 3 pairs query ``I*B + a*s + (s-1-t)`` with key ``J*B + b*s + t`` for all a, b, t. Those
    are exactly the pairs whose offsets in their blocks add up to ``s - 1`` modulo ``s``. A soft cap bounds the mean.
    """
    size, s, dtype = policy.block_size, policy.stride, accumulator_dtype(q)
    start = len(k) - len(q)
    rows = torch.arange(max(row * size, start), min((row + 1) * size, len(k)), device=q.device)
    keys = torch.arange(min((row + 1) * size, len(k)), device=q.device)
    products = q[rows - start].to(dtype) @ k[keys].to(dtype).T
    on_antidiagonal = (rows[:, None] % size + keys % size) % s == s - 1
    per_block = torch.stack([part.sum() for part in torch.split(products * on_antidiagonal, size, dim=1)])
    route = scale / (len(rows) * (size // s)) * per_block
    return route if softcap is None else softcap * (route / softcap).tanh()


def block_magnitude(v: Tensor, policy: Stem) -> Tensor:
    """The value term of every key block of one kv head."""
    norm = v.to(accumulator_dtype(v)).pow(2).sum(-1).sqrt()
    if policy.magnitude == "none" or len(v) == 0:
        return norm.new_zeros(math.ceil(len(v) / policy.block_size))
    if policy.magnitude == "log":
        return torch.stack([part.log().clamp(min=0).max() for part in torch.split(norm, policy.block_size)])
    u = torch.stack([torch.log(1e-6 + part.max()) for part in torch.split(norm, policy.stride)])
    whole = u[: max(len(v) // policy.stride, 1)]
    std = whole.std() if len(whole) > 1 else u.new_zeros(())
    z = torch.relu((u - whole.mean()) / (std + 1e-6))
    per_block = policy.block_size // policy.stride
    return torch.stack([part.sum() / per_block for part in torch.split(z, per_block)])


def budget(row: int, num_blocks: int, policy: Stem) -> int:
    """``k(I)`` of section 4."""
    short, long, knee = policy.ratio_short * num_blocks, policy.ratio_long * num_blocks, policy.knee_tokens / policy.block_size
    floor = policy.sink_blocks + policy.local_blocks if policy.min_blocks is None else policy.min_blocks
    if policy.schedule == "angelslim":
        k_start = num_blocks if num_blocks < 56 else int(short if num_blocks < knee else long) + 30
        k_start = min(max(k_start, floor), num_blocks)
        if row < k_start:
            return k_start
        progress = (row - k_start) / max(num_blocks - k_start - 1, 1)
        return max(1, math.floor(k_start * (1 - (1 - policy.decay) * progress) + 1e-9))
    if policy.schedule == "step":
        wanted = short if num_blocks <= math.ceil(knee) else long
    else:
        wanted = min(short, max(long, policy.ratio_short * knee))
    k_start = min(max(math.ceil(wanted - 1e-9), floor), num_blocks)
    return math.ceil(k_start - k_start * (1 - policy.decay) * row / num_blocks - 1e-9)


def choose_row(scores: Tensor, row: int, num_blocks: int, policy: Stem) -> list[int]:
    """Section 5 for one query block: the ids to keep."""
    if row >= num_blocks - policy.tail_blocks:
        return list(range(row + 1))
    forced = {j for j in range(row + 1) if j < policy.sink_blocks or j > row - policy.local_blocks}
    values = scores.tolist()
    ranked = sorted(range(row + 1), key=lambda j: (not math.isnan(values[j]), 0.0 if math.isnan(values[j]) else -values[j], j))
    k = budget(row, num_blocks, policy)
    if policy.forced == "extra":
        return sorted(forced | set(ranked[:k]))
    free = [j for j in ranked if j not in forced]
    return sorted(forced | set(free[: max(k - len(forced), 0)]))
