"""Which requests of a step take Stem, and where their tokens, keys and pages lie. Knows no vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

Index = slice | Tensor


@dataclass(frozen=True)
class Row:
    """One request in a step, in host integers.

    Attributes:
        q_len: Tokens of this step.
        kv_len: Tokens up to and including this step.
        prompt_len: Tokens of the whole prompt.
        obstacle: Why Stem must not run whatever the lengths, or None.
    """

    q_len: int
    kv_len: int
    prompt_len: int
    obstacle: str | None = None

    def dense_reason(self, min_query_len: int, dense_limit: int) -> str | None:
        """Why this request is left to the host's attention, or None when it takes Stem."""
        if self.obstacle is not None:
            return self.obstacle
        if max(self.prompt_len, self.kv_len) < dense_limit:
            return "short prompt"
        return "short chunk" if self.q_len < min_query_len else None


@dataclass(frozen=True)
class SparseRows:
    """The requests of a step that take Stem.

    Attributes:
        tokens: Where their tokens are in the step's.
        q_starts: Where each one's queries start among them, and the total.
        k_starts: Where each one's keys would start if they were packed, and the total.
        prompt_lens: Whole prompt length of each.
        pages: int32 ``(rows, max_pages)``, as :func:`stem_attention.stem_attention_varlen` takes it.
    """

    tokens: Index
    q_starts: tuple[int, ...]
    k_starts: tuple[int, ...]
    prompt_lens: tuple[int, ...]
    pages: Tensor

    @classmethod
    def of(cls, rows: Sequence[Row], chosen: Sequence[int], pages: Tensor) -> SparseRows:
        """The chosen ones of a step's rows; ``pages`` has a line for each row of the step."""
        picked = [rows[i] for i in chosen]
        return cls(
            tokens=token_index(rows, chosen, pages.device),
            q_starts=_starts(row.q_len for row in picked),
            k_starts=_starts(row.kv_len for row in picked),
            # A request that was preempted reads its own answer again as if it were prompt.
            prompt_lens=tuple(max(row.prompt_len, row.kv_len) for row in picked),
            pages=pages[row_index(chosen, pages.device)],
        )


def row_index(chosen: Sequence[int], device: torch.device) -> Index:
    """Rows as a slice if they are neighbours, else as indices on the device."""
    if chosen[-1] - chosen[0] + 1 == len(chosen):
        return slice(chosen[0], chosen[-1] + 1)
    return to_device(chosen, torch.int64, device)


def token_index(rows: Sequence[Row], chosen: Sequence[int], device: torch.device) -> Index:
    """The tokens of the chosen rows, likewise. Rows lie one after the other."""
    starts = _starts(row.q_len for row in rows)
    if chosen[-1] - chosen[0] + 1 == len(chosen):
        return slice(starts[chosen[0]], starts[chosen[-1] + 1])
    return to_device([token for i in chosen for token in range(starts[i], starts[i + 1])], torch.int64, device)


def to_device(numbers: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy host integers to the device without waiting for it."""
    tensor = torch.tensor(numbers, dtype=dtype)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _starts(lengths: Iterable[int]) -> tuple[int, ...]:
    return tuple(accumulate(lengths, initial=0))
