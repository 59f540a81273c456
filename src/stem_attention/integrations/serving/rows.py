"""The requests of a step that take Stem, and where their tokens, keys and pages lie. Knows no server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from stem_attention.blocks import BlockGrid, block_count
from stem_attention.call import PackedBatch, to_device
from stem_attention.policies import Policy

Index = slice | Tensor


@dataclass(frozen=True)
class Row:
    """One request in a step, in host integers.

    Attributes:
        q_len: Tokens of this step.
        kv_len: Tokens up to and including this step.
        prompt_len: Tokens of the whole prompt; 0 where the server does not say.
        obstacle: Why Stem must not run whatever the lengths, or None.
    """

    q_len: int
    kv_len: int
    prompt_len: int
    obstacle: str | None = None

    @property
    def whole_len(self) -> int:
        """Tokens that the policy counts: those of the prompt, or those so far.

        There are more so far where the prompt's length is not known, and where a request was preempted and reads its own
        answer again as if it were prompt.
        """
        return max(self.prompt_len, self.kv_len)

    def dense_reason(self, min_query_len: int, dense_below: int) -> str | None:
        """Tell why this request is left to the server's attention, or None when it takes Stem."""
        if self.obstacle is not None:
            return self.obstacle
        if self.q_len < min_query_len:
            return "short chunk"
        return "short prompt" if self.whole_len < dense_below else None


def split(rows: Sequence[Row], min_query_len: int, dense_below: int) -> tuple[list[int], dict[int, str]]:
    """Return which of a step's rows take Stem, and why each of the others that have tokens does not."""
    reasons = {i: row.dense_reason(min_query_len, dense_below) for i, row in enumerate(rows)}
    dense = {i: reason for i, reason in reasons.items() if reason is not None and rows[i].q_len > 0}
    return [i for i, reason in reasons.items() if reason is None], dense


def first_reason(reasons: Mapping[str, bool]) -> str | None:
    """Return the first reason that applies, or None."""
    return next((reason for reason, applies in reasons.items() if applies), None)


@dataclass(frozen=True)
class SparseRows:
    """Requests of a step that run together.

    Attributes:
        tokens: Where their tokens are in the step's.
        batch: Where each one's queries, keys and pages lie; all layers share it.
        causal_blocks: Block pairs that dense attention would read, for one head of one layer.
        kept_blocks: Those that the policy keeps of them; None where that depends on the data.
    """

    tokens: Index
    batch: PackedBatch
    causal_blocks: int
    kept_blocks: int | None

    @classmethod
    def of(
        cls, rows: Sequence[Row], chosen: Sequence[int], pages: Tensor | None, policy: Policy,
        device: torch.device | None = None,
    ) -> SparseRows:  # fmt: skip
        """Take the chosen ones of a step's rows.

        ``pages``, int32 ``(rows, max_pages)``, has a line for each of all rows; where keys are packed as queries are, it is
        None and the ``device`` is told.
        """
        size, causal, kept = policy.block_size, 0, list[int]()
        for row in (rows[i] for i in chosen):
            grid, counts = BlockGrid(row.q_len, row.kv_len, size), policy.row_counts(block_count(row.whole_len, size))
            causal += grid.causal_pairs
            kept += [] if counts is None else [sum(counts[grid.first_row : grid.end_row])]
        lengths = [(rows[i].q_len, rows[i].kv_len, rows[i].whole_len) for i in chosen]
        q_lens, kv_lens, prompt_lens = zip(*lengths, strict=True)
        place = device if pages is None else pages.device
        assert place is not None
        index, tokens = index_rows(rows, chosen, place)
        table = None if pages is None else pages[index]
        batch = PackedBatch.plan(q_lens, kv_lens, prompt_lens=prompt_lens, page_table=table, device=place)
        return cls(tokens, batch, causal, sum(kept) if len(kept) == len(chosen) else None)


def index_rows(rows: Sequence[Row], chosen: Sequence[int], device: torch.device) -> tuple[Index, Index]:
    """Index the chosen rows and their tokens: by slices if they are neighbours, else by integers on the device."""
    starts = list(accumulate((row.q_len for row in rows), initial=0))  # rows lie one after the other
    first, end = chosen[0], chosen[-1] + 1
    if end - first == len(chosen):
        return slice(first, end), slice(starts[first], starts[end])
    tokens = [token for i in chosen for token in range(starts[i], starts[i + 1])]
    return to_device(chosen, torch.int64, device), to_device(tokens, torch.int64, device)
