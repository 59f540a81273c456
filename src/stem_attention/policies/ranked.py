"""What policies that rank blocks by a score have in common: Stem's budgets, forced blocks and dense tail."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor

from stem_attention.config import StemConfig
from stem_attention.errors import bad_argument
from stem_attention.policies.base import check_is_config
from stem_attention.policies.budget import block_count, ranked_budgets, row_budgets
from stem_attention.policies.choose import choose, merge_forced
from stem_attention.selection import PAD, BlockSelection

# Choosing costs a dozen small steps whatever the rows, so scores that come row by row are chosen from in runs of these.
_RUN = 32


class Ranked(ABC):
    """Keeps the best blocks of every row, as many as Stem's schedule allows; subclasses say how good a block is."""

    config: StemConfig

    def __post_init__(self) -> None:
        check_is_config(self.config)
        if self.config.keep != "budget":
            fix = "take StemConfig() or StemConfig.paper(); Mass is the policy of the other rule"
            raise bad_argument("config", 'one with keep="budget"', f"keep={self.config.keep!r}", fix)

    @abstractmethod
    def scores(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, first_row: int, end_row: int
    ) -> Iterator[tuple[int, Tensor]]:
        """Score the query blocks ``first_row`` to ``end_row``, of which there is at least one, in order.

        Args:
            q: As a policy gets it, ``(batch, q_len, q_heads, dim)``.
            k: ``(batch, kv_len, kv_heads, dim)``.
            v: The shape of ``k``.
            scale: Softmax scale.
            first_row: Absolute query block of the first query.
            end_row: One past that of the last query.

        Yields:
            The first of a run of query blocks, and ``(batch, q_heads, rows, columns)``: higher is better. ``columns`` are the
            causal key blocks of the run's last row; what a row holds after its diagonal does not count.
        """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, prompt_len: int | None = None
    ) -> BlockSelection:
        config, kv_len, start = self.config, k.shape[1], k.shape[1] - q.shape[1]
        scale = q.shape[3] ** -0.5 if scale is None else scale
        num_blocks = block_count(kv_len if prompt_len is None else prompt_len, config.block_size)
        first_row, end_row = start // config.block_size, block_count(kv_len, config.block_size)
        budgets = row_budgets(config, num_blocks)[first_row:end_row] if q.shape[1] else ()
        shape = (q.shape[0], q.shape[2], len(budgets), max(budgets, default=0))
        indices = torch.full(shape, PAD, dtype=torch.int32, device=q.device)
        for row, scores in self.scores(q, k, v, scale, first_row, end_row) if budgets else ():
            ids = self._choose(scores, row, num_blocks)
            indices[:, :, row - first_row : row - first_row + scores.shape[2], : ids.shape[3]] = ids
        if config.forced == "inside":
            counts = torch.tensor(budgets, dtype=torch.int32, device=q.device).expand(shape[:3]).contiguous()
        else:
            counts = (indices != PAD).sum(-1, dtype=torch.int32)
        return BlockSelection(indices, counts, config.block_size, q.shape[1], kv_len)

    def _choose(self, scores: Tensor, row: int, num_blocks: int) -> Tensor:
        config, rows = self.config, scores.shape[2]
        budgets = ranked_budgets(config, num_blocks)[row : row + rows]
        if config.forced == "inside":
            return choose(scores, row, budgets, config.sink_blocks, config.local_blocks)
        free = [min(i + 1, budget) for i, budget in enumerate(budgets, row)]
        merged = merge_forced(choose(scores, row, free, 0, 0), row, scores.shape[3], config.sink_blocks, config.local_blocks)
        return merged[..., : max(row_budgets(config, num_blocks)[row : row + rows])]


def in_runs(rows: Iterable[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
    """Join scores of single query blocks, ``(batch, q_heads, row + 1)`` in order, into what :meth:`Ranked.scores` yields."""
    rows = iter(rows)
    while run := list(islice(rows, _RUN)):
        columns = run[-1][1].shape[2]
        padded = [torch.nn.functional.pad(scores, (0, columns - scores.shape[2])) for _, scores in run]
        yield run[0][0], torch.stack(padded, 2)
