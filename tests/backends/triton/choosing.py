"""The kernel that chooses blocks, alone, on scores of any kind."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from stem_attention.backends.triton.stem import choice_warps
from stem_attention.backends.triton.stem_kernels import choose_kernel
from stem_attention.backends.triton.tables import device_table


def choose(scores: Tensor, first_row: int, budgets: Sequence[int], sink: int, local: int) -> tuple[Tensor, Tensor]:
    """What ``stem_attention.policies.ranked.choose`` computes, and counts; ``scores`` is contiguous."""
    batch, heads, rows, columns = scores.shape
    indices = torch.empty((batch, heads, rows, max(budgets)), dtype=torch.int32, device=scores.device)
    counts = torch.empty((batch, heads, rows), dtype=torch.int32, device=scores.device)
    table = device_table([[0] * first_row + list(budgets)], torch.int32, scores.device)
    width = max(32, triton.next_power_of_2(first_row + rows))
    choose_kernel[(rows, heads, batch)](
        scores, table, indices, counts, None, None, 0, rows, first_row + rows, 0, rows, rows, columns, max(budgets), B=1,
        SINK=sink, LOCAL=local, EXTRA=False, IMPLICIT=False, COLUMNS=width, RAGGED=False, num_warps=choice_warps(width),
    )  # fmt: skip
    return indices, counts
