"""The rules that were tried beside Mass on Qwen 1.5B, as policies: each changes one thing in the estimate. Plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stem_attention.blocks import BlockGrid, block_count
from stem_attention.policies.mass import Mass, pool, pool_variances
from stem_attention.policies.metric import accumulator_dtype, grouped_product, runs
from stem_attention.selection import BlockSelection

RULES = ("mass", "norm", "distance", "scatter", "nosink", "token", "floor", "seen")
_WORKSPACE = 1 << 26


@dataclass(frozen=True)
class Variant(Mass):
    """Mass with one change.

    mass      none: the twin of the library's own kernel, for comparison
    norm      a pool's weight times the mean norm of its values, in the numerator and in the row's sum (output-aware)
    distance  the same with the mean distance of its values from the head's mean value
    scatter   the same with the root mean square distance of its values from their block's mean: what a mean cannot replace
    nosink    the row's sum leaves out the sink blocks, which every row keeps
    token     the densest pool of a block decides, by its weight a key, and not the sum over its pools
    floor     the threshold is at least ``strength`` times the median mass of the row's blocks (a noise floor a row)
    seen      the threshold is share over the blocks that the row sees, not over those of the whole prompt
    """

    name: ClassVar[str] = "variant"

    rule: str = "mass"
    strength: float = 2.0

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, prompt_len: int | None = None
    ) -> BlockSelection:
        (batch, _, heads, dim), grid = q.shape, BlockGrid.of(q, k, self.block_size)
        num_blocks = block_count(grid.kv_len if prompt_len is None else prompt_len, self.block_size)
        rows = torch.arange(grid.first_row, grid.end_row, device=q.device)[:, None]
        columns = torch.arange(grid.key_blocks, device=q.device)
        mask = (self.always_kept(rows, columns, num_blocks) & (columns <= rows)).expand(batch, heads, -1, -1).clone()
        for row, mass in masses(q, k, v, self, dim**-0.5 if scale is None else scale):
            first, (count, width) = row - grid.first_row, mass.shape[2:]
            here = rows[first : first + count]
            causal = columns[:width] <= here
            least: Tensor | float = self.share / num_blocks
            if self.rule == "seen":
                least = self.share / (here + 1)
            elif self.rule == "floor":
                typical = mass.masked_fill(~causal, torch.nan).nanmedian(-1, keepdim=True).values
                least = (self.strength * typical).clamp(min=self.share / num_blocks)
            mask[:, :, first : first + count, :width] |= ~(mass < least) & causal
        return _lists(mask, self.block_size, grid)


def _lists(mask: Tensor, size: int, grid: BlockGrid) -> BlockSelection:
    """BlockSelection.from_mask without its checks, which wait for the GPU."""
    counts = mask.sum(-1, dtype=torch.int32)
    width, end = int(counts.max()), mask.shape[3]
    columns = torch.arange(end, dtype=torch.int32, device=mask.device)
    ascending = torch.where(mask, columns, end).sort(-1).values[..., :width]
    return BlockSelection(torch.where(ascending < end, ascending, -1).contiguous(), counts, size, grid.q_len, grid.kv_len)


def value_sizes(v: Tensor, policy: Variant) -> Tensor | None:
    """``(batch, kv_heads, 1, pools)`` in fp32: the logarithm of the size by which a pool's weight is multiplied."""
    rule, size, length = policy.rule, policy.block_size, v.shape[1]
    if rule not in ("norm", "distance", "scatter"):
        return None
    x = v.to(accumulator_dtype(v))
    if rule == "distance":
        x = x - x.mean(1, keepdim=True)
    elif rule == "scatter":
        blocks = runs(x, 0, size, size)
        present = (torch.arange(blocks.shape[1] * size, device=v.device) < length).view(-1, size)
        mean = blocks.sum(2) / present.sum(1).clamp(min=1)[:, None, None]
        x = (blocks - mean[:, :, None]).flatten(1, 2)[:, :length]
    norms = torch.linalg.vector_norm(x, dim=-1)[..., None]  # (batch, length, kv_heads, 1)
    if rule == "scatter":
        norms = norms.square()
    cut = runs(norms, 0, size, policy.key_pool)
    counts = (torch.arange(cut.shape[1] * policy.key_pool, device=v.device) < length).view(-1, policy.key_pool).sum(1)
    means = cut.sum(2)[..., 0] / counts.clamp(min=1)[:, None]
    if rule == "scatter":
        means = means.sqrt()
    return means.clamp(min=1e-12).log().transpose(1, 2)[:, :, None]


def masses(q: Tensor, k: Tensor, v: Tensor, policy: Variant, scale: float) -> Iterator[tuple[int, Tensor]]:
    """As stem_attention.policies.mass.block_masses, in fp32, with the rule's change."""
    size, grid, dtype = policy.block_size, BlockGrid.of(q, k, policy.block_size), accumulator_dtype(q)
    per_row, per_column, group = size // policy.query_pool, size // policy.key_pool, q.shape[2] // k.shape[2]
    keys, key_counts = pool(k, 0, size, policy.key_pool)
    keys, weights = keys.to(dtype), key_counts.to(dtype).log()
    variances = pool_variances(k, size, policy.key_pool).to(dtype) if policy.spread else None
    values = value_sizes(v, policy)
    begins = torch.arange(len(key_counts), device=q.device) * policy.key_pool
    sinks = policy.sink_blocks * per_column
    step = max(1, _WORKSPACE // (q.shape[0] * q.shape[2] * per_row * len(key_counts)))
    for row in range(grid.first_row, grid.end_row, step):
        stop = min(row + step, grid.end_row)
        low, high, seen = grid.row_positions(row)[0], grid.row_positions(stop - 1)[1], stop * per_column
        queries, counts = pool(q[:, grid.query_slice(row, stop)], low, size, policy.query_pool)
        queries = queries.to(dtype)
        logits = grouped_product(queries, keys[:, :, :seen]) * scale + weights[:seen]
        if values is not None:
            logits += values[..., :seen].repeat_interleave(group, 1)
        lasts = (torch.arange(row * per_row, stop * per_row, device=q.device) + 1).mul(policy.query_pool).clamp(max=high) - 1
        logits.masked_fill_(begins[:seen] > lasts[:, None], -torch.inf)
        if policy.rule == "nosink" and seen > sinks:
            level = logits[..., sinks:].logsumexp(-1, keepdim=True)
            level = torch.where(level.isneginf(), logits.logsumexp(-1, keepdim=True), level)
        else:
            level = logits.logsumexp(-1, keepdim=True)
        if variances is not None:
            above = grouped_product(queries.square(), variances[:, :, :seen]).sqrt()
            logits += above * (policy.spread * abs(scale))
        weight = torch.unflatten((logits - level).exp(), -1, (-1, per_column))
        if policy.rule == "token":
            present = torch.unflatten(key_counts[:seen].clamp(min=1), 0, (-1, per_column))
            mass = (weight * (size / present)).amax(-1)
        else:
            mass = weight.sum(-1)
        mass = mass.masked_fill((counts == 0)[:, None], 0)
        yield row, torch.unflatten(mass, 2, (-1, per_row)).amax(3)
