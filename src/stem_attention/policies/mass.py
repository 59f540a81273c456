"""Keep by mass: every block that may hold a noticeable share of some query's attention.

Queries and keys are averaged in short pools (of 16 and 32 tokens). A softmax over the key pools estimates how each query
pool spreads its attention. A pool's mean hides the one key that matters, so a pool is judged ``spread`` standard deviations
above it; a block is kept if any query pool of the row may give it ``share / NB`` or more, ``NB`` being the blocks of the
whole prompt. Nothing is ranked and no row, head or layer has a fixed budget: heads that look at little
keep little, and what they save goes where attention is spread. Measured in docs/mass.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from stem_attention.checks import check_config
from stem_attention.config import StemConfig
from stem_attention.errors import bad_argument
from stem_attention.policies.base import check_is_config
from stem_attention.policies.budget import block_count
from stem_attention.policies.metric import accumulator_dtype
from stem_attention.selection import BlockSelection

# Estimated weights held at a time, in elements; while the softmax runs there are two of them.
_WORKSPACE = 1 << 24


@dataclass(frozen=True)
class Mass:
    """The policy of ``StemConfig(keep="mass")``; see :class:`stem_attention.policies.Policy` for the call.

    Attributes:
        config: With ``keep="mass"``.

    Raises:
        ValueError: The config has another rule.
    """

    name: ClassVar[str] = "mass"

    config: StemConfig = field(default_factory=StemConfig.mass)

    def __post_init__(self) -> None:
        check_is_config(self.config)
        if self.config.keep != "mass":
            raise bad_argument("config", 'one with keep="mass"', f"keep={self.config.keep!r}", "take StemConfig.mass()")

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, prompt_len: int | None = None
    ) -> BlockSelection:
        config, (batch, q_len, heads, dim), kv_len = check_config(self.config, q.shape[2]), q.shape, k.shape[1]
        num_blocks = block_count(kv_len if prompt_len is None else prompt_len, config.block_size)
        first, end = (kv_len - q_len) // config.block_size, block_count(kv_len, config.block_size)
        rows = torch.arange(first, end if q_len else first, device=q.device)[:, None]
        columns = torch.arange(end, device=q.device)
        always = always_kept(config, rows, columns, num_blocks)
        mask = (always & (columns <= rows)).expand(batch, heads, -1, -1).clone()
        shares = torch.tensor([config.head_share(head) for head in range(heads)], dtype=torch.float64, device=q.device)
        least = shares[:, None, None] / num_blocks
        for row, mass in block_masses(q, k, config, dim**-0.5 if scale is None else scale) if q_len else ():
            part = mask[:, :, row - first : row - first + mass.shape[2], : mass.shape[3]]
            # Written so that NaN is kept: what dense attention would poison stays visible.
            part |= ~(mass < least.to(mass.dtype)) & (columns[: mass.shape[3]] <= rows[row - first :][: mass.shape[2]])
        return BlockSelection.from_mask(mask, block_size=config.block_size, q_len=q_len, kv_len=kv_len)


def always_kept(config: StemConfig, rows: Tensor, columns: Tensor, num_blocks: int) -> Tensor:
    """Which key blocks ``columns`` a query block ``rows[i, 0]`` keeps whatever they hold, those of its future among them."""
    return (columns < config.sink_blocks) | (columns > rows - config.local_blocks) | (rows >= num_blocks - config.tail_blocks)


def pool(x: Tensor, start: int, size: int, pool_size: int) -> tuple[Tensor, Tensor]:
    """Means of runs of tokens, rounded to the dtype of ``x`` as the kernels' operands are.

    Args:
        x: ``(batch, length, heads, dim)``, token ``i`` at absolute position ``start + i``.
        start: Absolute position of the first token.
        size: Tokens per block; pools cover whole blocks.
        pool_size: Tokens per pool, on absolute positions.

    Returns:
        ``(batch, heads, pools, dim)``, the first pool being that of the first token's block, and int64 ``(pools,)``, how many
        tokens each pool has; one without tokens is 0.
    """
    before, after = start % size, -(start + x.shape[1]) % size
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, before, after))
    sums = torch.unflatten(padded, 1, (-1, pool_size)).sum(2, dtype=accumulator_dtype(x))
    begins = torch.arange(sums.shape[1], device=x.device) * pool_size - before
    counts = (begins + pool_size).clamp(max=x.shape[1]) - begins.clamp(min=0)
    means = sums / counts.clamp(min=1).to(sums.dtype)[:, None, None]
    return means.to(x.dtype).transpose(1, 2), counts.clamp(min=0)


def pool_variances(x: Tensor, size: int, pool_size: int) -> Tensor:
    """Variances in each dimension of the pools of :func:`pool`, whose first token stands at position 0; not rounded."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % size))
    runs = torch.unflatten(padded, 1, (-1, pool_size)).to(accumulator_dtype(x))
    present = torch.unflatten(torch.arange(padded.shape[1], device=x.device) < x.shape[1], 0, (-1, pool_size))
    divisor = present.sum(1).clamp(min=1).to(runs.dtype)[:, None, None]
    away = (runs - (runs.sum(2) / divisor)[:, :, None]) * present[:, :, None, None]
    return (away.square().sum(2) / divisor).transpose(1, 2)


def block_masses(q: Tensor, k: Tensor, config: StemConfig, scale: float) -> Iterator[tuple[int, Tensor]]:
    """Attention that the query blocks may give to key blocks: the most that any query pool of the row may give.

    A pool's keys count as many times as there are of them, and a query pool sees the key pools that begin at or before its
    last query. With ``spread`` above 0 a row's masses sum to more than 1.

    Yields:
        The first of a run of query blocks, and ``(batch, q_heads, rows, columns)`` in fp32 (fp64 on the CPU and for fp64);
        columns reach to the run's last diagonal.
    """
    size, (batch, q_len, heads, _), (kv_len, kv_heads) = config.block_size, q.shape, k.shape[1:3]
    start, per_row, per_column = kv_len - q_len, size // config.query_pool, size // config.key_pool
    keys, key_counts = pool(k, 0, size, config.key_pool)
    # In fp64 a chunk of a prompt estimates what the whole does, whatever the shapes of its products.
    dtype = torch.float64 if q.device.type == "cpu" else accumulator_dtype(q)
    keys, weights = keys.to(dtype).mT, key_counts.to(dtype).log()
    variances = pool_variances(k, size, config.key_pool).to(dtype).mT if config.spread else None
    begins = torch.arange(len(key_counts), device=q.device) * config.key_pool
    first, end = start // size, block_count(kv_len, size)
    step = max(1, _WORKSPACE // (batch * heads * per_row * len(key_counts)))
    for row in range(first, end, step):
        stop = min(row + step, end)
        low, high, seen = max(row * size, start), min(stop * size, kv_len), stop * per_column
        queries, counts = pool(q[:, low - start : high - start], low, size, config.query_pool)
        grouped = torch.unflatten(queries.to(dtype), 1, (kv_heads, -1)).flatten(2, 3)
        logits = (grouped @ keys[..., :seen]) * scale + weights[:seen]
        lasts = (torch.arange(row * per_row, stop * per_row, device=q.device) + 1).mul(config.query_pool).clamp(max=high) - 1
        logits = torch.unflatten(logits, 2, (-1, len(counts)))
        logits = logits.masked_fill(begins[:seen] > lasts[:, None], -torch.inf)
        level = logits.logsumexp(-1, keepdim=True)
        if variances is not None:
            above = (grouped.square() @ variances[..., :seen]).sqrt() * (config.spread * abs(scale))
            logits = logits + torch.unflatten(above, 2, (-1, len(counts)))
        mass = torch.unflatten((logits - level).exp(), -1, (-1, per_column)).sum(-1)
        absent = (counts == 0)[:, None]
        yield row, torch.unflatten(mass.masked_fill(absent, 0).flatten(1, 2), 2, (-1, per_row)).amax(3)
