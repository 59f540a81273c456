"""Launch of the choice of blocks, for scores of whichever policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from stem_attention.backends.triton.choose_kernel import choose_kernel
from stem_attention.backends.triton.tables import device_table

_COLUMNS_PER_WARP = 512


def choose(scores: Tensor, first_row: int, budgets: Sequence[int], sink: int, local: int) -> tuple[Tensor, Tensor]:
    """What :func:`stem_attention.policies.choose.choose` computes, on the device and without waiting for it.

    Args:
        scores: fp32 ``(batch, heads, rows, columns)``, contiguous; column ``J`` is key block ``J``. Ties go to the smaller
            block, a NaN ranks above everything.
        first_row: Absolute query block of the first row.
        budgets: Blocks to keep per row, forced ones among them; a causal row is kept whole at its length or more.
        sink: Leading blocks that every row keeps.
        local: Blocks up to and including the diagonal that every row keeps.

    Returns:
        int32 ``(batch, heads, rows, max(budgets))`` of ascending block ids, padded with -1, and int32 counts.
    """
    batch, heads, rows, columns = scores.shape
    width = max(budgets, default=0)
    indices = torch.empty((batch, heads, rows, width), dtype=torch.int32, device=scores.device)
    counts = torch.empty((batch, heads, rows), dtype=torch.int32, device=scores.device)
    if rows:
        table = device_table([[0] * first_row + list(budgets)], torch.int32, scores.device)
        launch(
            scores, table, indices, counts, batch, heads, None, None, 0, rows, first_row + rows, 0, rows, rows, columns, width,
            first_row + rows, B=1, SINK=sink, LOCAL=local, EXTRA=False, IMPLICIT=False, RAGGED=False,
        )  # fmt: skip
    return indices, counts


def launch(
    scores: Tensor, budgets: Tensor, indices: Tensor, counts: Tensor, batch: int, heads: int, cu_q: Tensor | None,
    cu_k: Tensor | None, budget_stride: int, q_len: int, kv_len: int, first_row: int, rows: int, total_rows: int, columns: int,
    width: int, seen: int, **constants: Any,
) -> None:  # fmt: skip
    """Run the kernel, which names the rest, on rows whose diagonal lies before block ``seen``."""
    looked_at = max(32, triton.next_power_of_2(seen))
    most_warps = 8 if torch.version.hip else 16  # of AMD's warps, twice as wide, 16 leave too few registers
    choose_kernel[(rows, heads, batch)](
        scores, budgets, indices, counts, cu_q, cu_k, budget_stride, q_len, kv_len, first_row, rows, total_rows, columns, width,
        COLUMNS=looked_at, num_warps=min(most_warps, max(1, looked_at // _COLUMNS_PER_WARP)), **constants,
    )  # fmt: skip
