"""Sections 3 to 5, as written, and independent of the fast path: no factorisation, no shared budget code."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stem_attention.config import StemConfig
from stem_attention.policies.metric import accumulator_dtype
from stem_attention.selection import BlockSelection


def select(q: Tensor, k: Tensor, v: Tensor, config: StemConfig, scale: float, prompt_len: int) -> BlockSelection:
    """Choose blocks row by row. fp64 inputs are scored in fp64, all others in fp32."""
    batch, q_len, q_heads, _ = q.shape
    kv_len, group, size = k.shape[1], q.shape[2] // k.shape[2], config.block_size
    num_blocks = math.ceil(prompt_len / size)
    first_row = (kv_len - q_len) // size
    rows = range(first_row, math.ceil(kv_len / size)) if q_len else range(0)
    lists = []
    for b in range(batch):
        per_head = []
        for h in range(q_heads):
            mag = block_magnitude(v[b, :, h // group], config)
            per_head.append(
                [
                    choose_row(
                        block_scores(q[b, :, h], k[b, :, h // group], row, config, scale) + config.beta * mag[: row + 1],
                        row, num_blocks, config,
                    )
                    for row in rows
                ]
            )  # fmt: skip
        lists.append(per_head)
    return BlockSelection.from_lists(lists, block_size=size, q_len=q_len, kv_len=kv_len, device=q.device)


def block_scores(q: Tensor, k: Tensor, row: int, config: StemConfig, scale: float) -> Tensor:
    """``route[I, J]`` for ``J <= I``: the mean of the block pair's strided antidiagonals.

    The factorised sum of section 3 pairs query ``I*B + a*s + (s-1-t)`` with key ``J*B + b*s + t`` for all a, b, t. Those
    are exactly the pairs whose offsets in their blocks add up to ``s - 1`` modulo ``s``.
    """
    size, s, dtype = config.block_size, config.stride, accumulator_dtype(q)
    start = len(k) - len(q)
    rows = torch.arange(max(row * size, start), min((row + 1) * size, len(k)), device=q.device)
    keys = torch.arange(min((row + 1) * size, len(k)), device=q.device)
    products = q[rows - start].to(dtype) @ k[keys].to(dtype).T
    on_antidiagonal = (rows[:, None] % size + keys % size) % s == s - 1
    per_block = torch.stack([part.sum() for part in torch.split(products * on_antidiagonal, size, dim=1)])
    return scale / (len(rows) * (size // s)) * per_block


def block_magnitude(v: Tensor, config: StemConfig) -> Tensor:
    """The value term of every key block of one kv head."""
    norm = v.to(accumulator_dtype(v)).pow(2).sum(-1).sqrt()
    if config.magnitude == "none" or len(v) == 0:
        return norm.new_zeros(math.ceil(len(v) / config.block_size))
    if config.magnitude == "log":
        return torch.stack([part.log().clamp(min=0).max() for part in torch.split(norm, config.block_size)])
    u = torch.stack([torch.log(1e-6 + part.max()) for part in torch.split(norm, config.stride)])
    whole = u[: max(len(v) // config.stride, 1)]
    std = whole.std() if len(whole) > 1 else u.new_zeros(())
    z = torch.relu((u - whole.mean()) / (std + 1e-6))
    per_block = config.block_size // config.stride
    return torch.stack([part.sum() / per_block for part in torch.split(z, per_block)])


def budget(row: int, num_blocks: int, config: StemConfig) -> int:
    """``k(I)`` of section 4."""
    short, long, knee = config.ratio_short * num_blocks, config.ratio_long * num_blocks, config.knee_tokens / config.block_size
    floor = config.sink_blocks + config.local_blocks if config.min_blocks is None else config.min_blocks
    if config.schedule == "angelslim":
        k_start = num_blocks if num_blocks < 56 else int(short if num_blocks < knee else long) + 30
        k_start = min(max(k_start, floor), num_blocks)
        if row < k_start:
            return k_start
        progress = (row - k_start) / max(num_blocks - k_start - 1, 1)
        return max(1, math.floor(k_start * (1 - (1 - config.decay) * progress) + 1e-9))
    if config.schedule == "step":
        wanted = short if num_blocks <= math.ceil(knee) else long
    else:
        wanted = min(short, max(long, config.ratio_short * knee))
    k_start = min(max(math.ceil(wanted - 1e-9), floor), num_blocks)
    return math.ceil(k_start - k_start * (1 - config.decay) * row / num_blocks - 1e-9)


def choose_row(scores: Tensor, row: int, num_blocks: int, config: StemConfig) -> list[int]:
    """Section 5 for one query block: the ids to keep."""
    if row >= num_blocks - config.tail_blocks:
        return list(range(row + 1))
    forced = {j for j in range(row + 1) if j < config.sink_blocks or j > row - config.local_blocks}
    values = scores.tolist()
    ranked = sorted(range(row + 1), key=lambda j: (not math.isnan(values[j]), 0.0 if math.isnan(values[j]) else -values[j], j))
    k = budget(row, num_blocks, config)
    if config.forced == "extra":
        return sorted(forced | set(ranked[:k]))
    free = [j for j in ranked if j not in forced]
    return sorted(forced | set(free[: max(k - len(forced), 0)]))
