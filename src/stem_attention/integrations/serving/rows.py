"""The requests of a step that take Stem, and where their tokens, keys and pages lie. Knows no server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from stem_attention.call import PackedBatch, to_device

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


@dataclass(frozen=True)
class SparseRows:
    """Requests of a step that run together.

    Attributes:
        tokens: Where their tokens are in the step's.
        batch: Where each one's queries, keys and pages lie; all layers share it.
    """

    tokens: Index
    batch: PackedBatch

    @classmethod
    def of(cls, rows: Sequence[Row], chosen: Sequence[int], pages: Tensor) -> SparseRows:
        """Take the chosen ones of a step's rows; ``pages``, int32 ``(rows, max_pages)``, has a line for each of all rows."""
        picked = [rows[i] for i in chosen]
        batch = PackedBatch.plan(
            [row.q_len for row in picked],
            [row.kv_len for row in picked],
            prompt_lens=[row.whole_len for row in picked],
            page_table=pages[row_index(chosen, pages.device)],
            device=pages.device,
        )
        return cls(token_index(rows, chosen, pages.device), batch)


def row_index(chosen: Sequence[int], device: torch.device) -> Index:
    """Index rows by a slice if they are neighbours, else by integers on the device."""
    if chosen[-1] - chosen[0] + 1 == len(chosen):
        return slice(chosen[0], chosen[-1] + 1)
    return to_device(chosen, torch.int64, device)


def token_index(rows: Sequence[Row], chosen: Sequence[int], device: torch.device) -> Index:
    """Index the tokens of the chosen rows, likewise. Rows lie one after the other."""
    starts = list(accumulate((row.q_len for row in rows), initial=0))
    if chosen[-1] - chosen[0] + 1 == len(chosen):
        return slice(starts[chosen[0]], starts[chosen[-1] + 1])
    return to_device([token for i in chosen for token in range(starts[i], starts[i + 1])], torch.int64, device)
