"""FlashPrefill's block score (arXiv 2603.06199): every query against the mean key of each block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from stem_attention.blocks import BlockGrid
from stem_attention.policies.mass import pool
from stem_attention.policies.metric import exact_dtype, grouped_product
from stem_attention.policies.ranked import Ranked

# Logits held at a time, in elements (64 MiB in fp32); while their exponentials are summed there are three of them.
_WORKSPACE = 1 << 24


@dataclass(frozen=True)
class FlashPrefillTopK(Ranked):
    """Rank blocks by FlashPrefill's score, under a budget.

    A block's score is the sum of ``exp(scale * q · mean key)`` over the queries of the row, as in the authors' code; here its
    logarithm, which ranks alike. The sum is over unlike queries as they are: no query's exponentials are divided by their own
    total, so those with large logits decide. A query counts for a block from the block's last token on. FlashPrefill itself
    keeps every block within a factor of the row's best; here a budget says how many are kept. For the fields see
    :class:`stem_attention.policies.Ranked`.
    """

    name: ClassVar[str] = "flashprefill-topk"

    def scores(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Iterator[tuple[int, Tensor]]:
        size, (batch, _, q_heads, _), grid = self.block_size, q.shape, BlockGrid.of(q, k, self.block_size)
        keys = pool(k, 0, size, size)[0].to(exact_dtype(q))
        ends = torch.arange(1, keys.shape[2] + 1, device=q.device) * size
        step = max(1, _WORKSPACE // (batch * q_heads * size * grid.end_row))
        for row in range(grid.first_row, grid.end_row, step):
            stop, low = min(row + step, grid.end_row), grid.row_positions(row)[0]
            queries = (q[:, grid.query_slice(row, stop)].to(keys.dtype) * scale).transpose(1, 2)
            before, after = low % size, -(low + queries.shape[2]) % size
            logits = grouped_product(pad(queries, (0, 0, before, after)), keys[:, :, :stop])
            positions = torch.arange(row * size, stop * size, device=q.device)[:, None]
            absent = (positions < low) | (positions >= low + queries.shape[2])
            logits.masked_fill_(absent | (ends[:stop] > positions + 1), -torch.inf)
            yield row, torch.unflatten(logits, 2, (-1, size)).logsumexp(3)
