"""FlashPrefill's block score (arXiv 2603.06199): every query against the mean key of each block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from stem_attention.config import StemConfig
from stem_attention.policies.mass import pool
from stem_attention.policies.metric import accumulator_dtype
from stem_attention.policies.ranked import Ranked

# Logits held at a time, in elements (64 MiB in fp32); while their exponentials are summed there are three of them.
_WORKSPACE = 1 << 24


@dataclass(frozen=True)
class FlashPrefillTopK(Ranked):
    """FlashPrefill's block score under Stem's budgets; see :class:`stem_attention.policies.Policy` for the call.

    A block's score is the sum of ``exp(scale * q · mean key)`` over the queries of the row, as in the authors' code; here its
    logarithm, which ranks alike. The sum is over unlike queries as they are: no query's exponentials are divided by their own
    total, so those with large logits decide. A query counts for a block from the block's last token on. FlashPrefill itself
    keeps every block within a factor of the row's best; here Stem's budget says how many are kept.

    Attributes:
        config: Budgets, forced blocks and tail; fields that belong to Stem's own score (``stride``, ``beta``,
            ``magnitude``) mean nothing here.
    """

    name: ClassVar[str] = "flashprefill-topk"

    config: StemConfig = field(default_factory=StemConfig)

    def scores(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, first_row: int, end_row: int
    ) -> Iterator[tuple[int, Tensor]]:
        """Logarithms of the summed exponentials; see :meth:`Ranked.scores`."""
        size, (batch, q_len, q_heads, _), kv_len = self.config.block_size, q.shape, k.shape[1]
        start = kv_len - q_len
        # In fp64 a chunk of a prompt ranks as the whole does, whatever the shapes of its products.
        dtype = torch.float64 if q.device.type == "cpu" else accumulator_dtype(q)
        keys = pool(k, 0, size, size)[0].to(dtype).mT
        step = max(1, _WORKSPACE // (batch * q_heads * size * end_row))
        for row in range(first_row, end_row, step):
            stop = min(row + step, end_row)
            low, high = max(row * size, start), min(stop * size, kv_len)
            queries = q[:, low - start : high - start].to(dtype) * scale
            yield row, _log_sums(queries, keys[..., :stop], low, size)


def _log_sums(queries: Tensor, keys: Tensor, low: int, size: int) -> Tensor:
    """Scores of the query blocks that scaled queries belong to.

    Args:
        queries: ``(batch, length, q_heads, dim)``, the first at position ``low``.
        keys: ``(batch, kv_heads, dim, columns)``, means of the blocks up to the last query's.
        low: Absolute position of the first query.
        size: Tokens per block.

    Returns:
        ``(batch, q_heads, rows, columns)``; minus infinity where no query of the row counts.
    """
    before, after = low % size, -(low + queries.shape[1]) % size
    positions = torch.arange(low - before, low + queries.shape[1] + after, device=queries.device)
    ends = torch.arange(1, keys.shape[3] + 1, device=queries.device) * size
    absent = (positions < low) | (positions >= low + queries.shape[1])
    hidden = absent[:, None] | (ends > positions[:, None] + 1)
    padded = torch.nn.functional.pad(queries, (0, 0, 0, 0, before, after))
    grouped = torch.unflatten(padded, 2, (keys.shape[1], -1)).permute(0, 2, 3, 1, 4)
    logits = torch.unflatten(grouped.flatten(2, 3) @ keys, 2, grouped.shape[2:4]).masked_fill_(hidden, -torch.inf)
    return torch.unflatten(logits.flatten(1, 2), 2, (-1, size)).logsumexp(3)
