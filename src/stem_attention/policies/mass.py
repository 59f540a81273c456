"""Keep by mass: every block that may hold a noticeable share of some query's attention. Measured in docs/mass.md."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from stem_attention.blocks import BlockGrid, block_count
from stem_attention.errors import bad_argument
from stem_attention.policies.base import Policy, check_divides, check_integers, check_number, is_number
from stem_attention.policies.metric import accumulator_dtype, capped, exact_dtype, grouped_product, runs
from stem_attention.selection import BlockSelection

# Estimated weights held at a time, in elements; while the softmax runs there are two of them. On a CPU they stay in its cache.
_WORKSPACE, _CPU_WORKSPACE = 1 << 24, 1 << 18


@dataclass(frozen=True)
class Mass(Policy):
    """Keep every block that may hold a noticeable share of some query's attention. The default policy.

    Queries and keys are averaged in short pools. A softmax over the key pools estimates how each query pool spreads its
    attention. A pool's mean hides the one key that matters, so a pool is judged ``spread`` standard deviations above it.
    Nothing is ranked and no row, head or layer has a fixed budget: heads that look at little keep little, and what they save
    goes where attention is spread.

    Attributes:
        share: A block is kept if any pool of queries of the row may give it at least ``share / NB`` of its attention,
            ``NB`` being the blocks of the whole prompt. Lower keeps more.
        spread: Standard deviations, of the scores that a pool's keys have, by which a pool is judged above the score of
            its mean. 0 judges by the mean. Higher keeps more: raise ``share`` with it.
        query_pool: Queries that are averaged to one. It divides ``block_size``.
        key_pool: Keys that are averaged to one. It divides ``block_size``.
        sink_blocks: Blocks at the start of the prompt that every row keeps.
        local_blocks: Blocks up to and including the diagonal that every row keeps. At least 1.
        tail_blocks: Last query blocks of the whole prompt, where the question usually stands, that keep everything.
        head_factors: ``share`` is multiplied by these: a row for each layer of a model (or a single one, for all of them),
            in it a number for each query head. ``stem-attention calibrate`` finds them. A call of one layer takes
            :meth:`for_layer`.
        block_size: Tokens per block.
    """

    name = "mass"

    share: float = 4.0
    spread: float = 0.5
    query_pool: int = 16
    key_pool: int = 32
    sink_blocks: int = 1
    local_blocks: int = 2
    tail_blocks: int = 2
    head_factors: tuple[tuple[float, ...], ...] | None = None
    block_size: int = 64

    def check(self) -> None:
        check_integers(self, sink_blocks=0, local_blocks=1, tail_blocks=0)
        check_number(self, "share", above=True)
        check_number(self, "spread")
        check_divides(self, "query_pool", "key_pool")
        if self.head_factors is not None:
            object.__setattr__(self, "head_factors", _checked_factors(self.head_factors))

    def for_layer(self, layer: int, heads: slice = slice(None)) -> "Mass":
        if self.head_factors is None or (len(self.head_factors) == 1 and heads == slice(None)):
            return self
        rows = len(self.head_factors)
        row = layer if rows > 1 else 0
        if not 0 <= row < rows:
            raise bad_argument("layer", f"one of the {rows} layers of head_factors", layer, "calibrate for this model")
        own = self.head_factors[row][heads]
        return self.once((row, heads.start, heads.stop, heads.step), lambda: replace(self, head_factors=(own,)))

    def check_model(self, layers: int, heads: int) -> None:
        if self.head_factors is None:
            return
        rows, width = len(self.head_factors), len(self.head_factors[0])
        if rows not in (1, layers) or width != heads:
            expected = f"{layers} x {heads} of them (layers x query heads of this model), or 1 x {heads} for every layer"
            raise bad_argument("head_factors", expected, f"{rows} x {width}", "run stem-attention calibrate on this model")

    def check_heads(self, heads: int) -> None:
        if self.head_factors is not None and (len(self.head_factors), len(self.head_factors[0])) != (1, heads):
            got = f"{len(self.head_factors)} x {len(self.head_factors[0])} of them"
            expected = f"head_factors of one layer and the {heads} query heads of q"
            raise bad_argument("policy", expected, got, "pass policy.for_layer(layer)")

    def head_share(self, head: int) -> float:
        """Return ``share`` times the factor of a query head of the one layer that this policy is for."""
        return self.share * (self.head_factors[0][head] if self.head_factors is not None else 1.0)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, prompt_len: int | None = None,
        softcap: float | None = None,
    ) -> BlockSelection:  # fmt: skip
        self.check_heads(q.shape[2])
        (batch, _, heads, dim), grid = q.shape, BlockGrid.of(q, k, self.block_size)
        num_blocks = block_count(grid.kv_len if prompt_len is None else prompt_len, self.block_size)
        rows = torch.arange(grid.first_row, grid.end_row, device=q.device)[:, None]
        columns = torch.arange(grid.key_blocks, device=q.device)
        always = self.always_kept(rows, columns, num_blocks)
        mask = (always & (columns <= rows)).expand(batch, heads, -1, -1).clone()
        shares = torch.tensor([self.head_share(head) for head in range(heads)], dtype=torch.float64, device=q.device)
        least = shares[:, None, None] / num_blocks
        for row, mass in block_masses(q, k, self, dim**-0.5 if scale is None else scale, softcap) if grid.rows else ():
            first, (count, width) = row - grid.first_row, mass.shape[2:]
            part = mask[:, :, first : first + count, :width]
            # Written so that NaN is kept: what dense attention would poison stays visible.
            part |= ~(mass < least.to(mass.dtype)) & (columns[:width] <= rows[first : first + count])
        return BlockSelection.from_mask(mask, block_size=self.block_size, q_len=grid.q_len, kv_len=grid.kv_len)

    def always_kept(self, rows: Tensor, columns: Tensor, num_blocks: int) -> Tensor:
        """Mark the key blocks ``columns`` that a query block ``rows[i, 0]`` keeps whatever they hold, of its future too."""
        tail = rows >= num_blocks - self.tail_blocks
        return (columns < self.sink_blocks) | (columns > rows - self.local_blocks) | tail


def _checked_factors(rows: object) -> tuple[tuple[float, ...], ...]:
    """Lists, as JSON has them, become tuples of floats."""
    expected = "None, or a row for each layer (or one for all) of finite numbers > 0, one for each query head"
    fix = "take those that stem-attention calibrate writes"
    if not isinstance(rows, (list, tuple)) or not rows or not all(isinstance(row, (list, tuple)) and row for row in rows):
        raise bad_argument("head_factors", expected, f"{type(rows).__name__} {rows!r:.60}", fix)
    if len({len(row) for row in rows}) > 1:
        raise bad_argument("head_factors", "rows of one length", f"rows of {sorted({len(row) for row in rows})}", fix)
    for factor in chain(*rows):
        if not is_number(factor) or not 0 < factor <= sys.float_info.max:
            raise bad_argument("head_factors", expected, repr(factor), fix)
    return tuple(tuple(map(float, row)) for row in rows)


def pool(x: Tensor, start: int, size: int, pool_size: int) -> tuple[Tensor, Tensor]:
    """Average runs of tokens, rounded to the dtype of ``x`` as the kernels' operands are.

    ``x`` is ``(batch, length, heads, dim)`` from position ``start`` on; pools of ``pool_size`` lie on absolute positions and
    cover whole blocks of ``size``. Returns ``(batch, heads, pools, dim)``, the first pool being that of the first token's
    block, and int64 ``(pools,)``, how many tokens each pool has; one without tokens is 0.
    """
    sums = runs(x, start, size, pool_size).sum(2, dtype=accumulator_dtype(x))
    begins = torch.arange(sums.shape[1], device=x.device) * pool_size - start % size
    counts = ((begins + pool_size).clamp(max=x.shape[1]) - begins.clamp(min=0)).clamp(min=0)
    means = sums / counts.clamp(min=1).to(sums.dtype)[:, None, None]
    return means.to(x.dtype).transpose(1, 2), counts


def pool_variances(x: Tensor, size: int, pool_size: int) -> Tensor:
    """Take the variances in each dimension of the pools of :func:`pool`, from position 0 on; not rounded."""
    pools = runs(x, 0, size, pool_size).to(accumulator_dtype(x))
    present = torch.arange(pools.shape[1] * pool_size, device=x.device).view(-1, pool_size) < x.shape[1]
    divisor = present.sum(1).clamp(min=1).to(pools.dtype)[:, None, None]
    away = (pools - (pools.sum(2) / divisor)[:, :, None]) * present[:, :, None, None]
    return (away.square().sum(2) / divisor).transpose(1, 2)


def block_masses(
    q: Tensor, k: Tensor, policy: Mass, scale: float, softcap: float | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Estimate the attention of query blocks to key blocks: the most that any query pool of the row may give.

    A pool's keys count as many times as there are of them, and a query pool sees the key pools that begin at or before its
    last query. With ``spread`` above 0 a row's masses sum to more than 1. A soft cap bounds the score of a pool's mean, and
    the score ``spread`` standard deviations above it.

    Yields:
        The first of a run of query blocks, and ``(batch, q_heads, rows, columns)`` in fp32 (fp64 on the CPU and for fp64);
        columns reach to the run's last diagonal.
    """
    size, grid, dtype = policy.block_size, BlockGrid.of(q, k, policy.block_size), exact_dtype(q)
    per_row, per_column = size // policy.query_pool, size // policy.key_pool
    keys, key_counts = pool(k, 0, size, policy.key_pool)
    keys, weights = keys.to(dtype), key_counts.to(dtype).log()
    variances = pool_variances(k, size, policy.key_pool).to(dtype) if policy.spread else None
    begins = torch.arange(len(key_counts), device=q.device) * policy.key_pool
    workspace = min(_WORKSPACE, _CPU_WORKSPACE) if q.device.type == "cpu" else _WORKSPACE
    step = max(1, workspace // (q.shape[0] * q.shape[2] * per_row * len(key_counts)))
    for row in range(grid.first_row, grid.end_row, step):
        stop = min(row + step, grid.end_row)
        low, high, seen = grid.row_positions(row)[0], grid.row_positions(stop - 1)[1], stop * per_column
        queries, counts = pool(q[:, grid.query_slice(row, stop)], low, size, policy.query_pool)
        queries = queries.to(dtype)
        scores = grouped_product(queries, keys[:, :, :seen]) * scale
        logits = capped(scores, softcap) + weights[:seen]
        lasts = (torch.arange(row * per_row, stop * per_row, device=q.device) + 1).mul(policy.query_pool).clamp(max=high) - 1
        logits.masked_fill_(begins[:seen] > lasts[:, None], -torch.inf)
        level = logits.logsumexp(-1, keepdim=True)
        if variances is not None:
            above = grouped_product(queries.square(), variances[:, :, :seen]).sqrt() * (policy.spread * abs(scale))
            if softcap is not None:
                above = capped(scores + above, softcap) - capped(scores, softcap)
            logits = logits + above
        mass = torch.unflatten((logits - level).exp(), -1, (-1, per_column)).sum(-1).masked_fill((counts == 0)[:, None], 0)
        yield row, torch.unflatten(mass, 2, (-1, per_row)).amax(3)
