"""From block scores to kept blocks: forced blocks, then the best of the rest, ties to the smaller id.

Any policy that scores blocks can use this step; it knows nothing of how the scores came about.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stem_attention.selection import PAD


def choose(scores: Tensor, first_row: int, budgets: Sequence[int], sink: int, local: int) -> Tensor:
    """Keep ``budgets[i]`` causal blocks of row ``first_row + i``, forced ones (sink, local) among them.

    Args:
        scores: ``(batch, heads, rows, columns)``, column ``J`` is key block ``J``; all causal blocks of the last row must
            be there. NaN ranks above everything, so what dense attention would poison stays visible.
        first_row: Absolute query block of the first row.
        budgets: Blocks to keep per row, at least its forced blocks and at most its causal ones.
        sink: Leading blocks that every row keeps.
        local: Blocks up to and including the diagonal that every row keeps.

    Returns:
        int64 ``(batch, heads, rows, max(budgets))``: ascending block ids, padded with -1.
    """
    columns, device = scores.shape[3], scores.device
    rows = torch.arange(first_row, first_row + len(budgets), device=device)[:, None]
    forced = _forced_ids(rows, columns, sink, local)
    wanted = torch.tensor(budgets, device=device)[:, None] - (forced < columns).sum(-1, keepdim=True)
    # Blocks that may not be chosen here all come after the candidates or before the slice, so that the stable sort
    # prefers a candidate of score -inf to them.
    rest = scores[..., sink:].masked_fill(torch.arange(columns, device=device)[sink:] > rows - local, -torch.inf)
    width = max(budgets, default=0)
    order = rest.sort(dim=-1, descending=True, stable=True).indices[..., :width] + sink
    picked = torch.where(torch.arange(order.shape[-1], device=device) < wanted, order, columns)
    ids = torch.cat([picked, forced.expand(*scores.shape[:3], -1)], -1).sort(-1).values[..., :width]
    return torch.where(ids < columns, ids, PAD)


def merge_forced(ids: Tensor, first_row: int, columns: int, sink: int, local: int) -> Tensor:
    """Add every row's sink and local blocks to ascending, -1 padded ``ids``; blocks already there count once."""
    rows = torch.arange(first_row, first_row + ids.shape[2], device=ids.device)[:, None]
    forced = _forced_ids(rows, columns, sink, local).expand(*ids.shape[:3], -1)
    merged = torch.cat([torch.where(ids == PAD, columns, ids), forced], -1).sort(-1).values
    again = torch.zeros_like(merged, dtype=torch.bool)
    again[..., 1:] = merged[..., 1:] == merged[..., :-1]
    unique = merged.masked_fill(again, columns).sort(-1).values
    return torch.where(unique < columns, unique, PAD)


def _forced_ids(rows: Tensor, columns: int, sink: int, local: int) -> Tensor:
    """``(rows, sink + local)`` ids of the forced blocks, each once; ``columns`` stands for "none"."""
    first = torch.arange(sink, device=rows.device).expand(len(rows), -1)
    last = rows - torch.arange(local - 1, -1, -1, device=rows.device)
    return torch.cat([torch.where(first <= rows, first, columns), torch.where(last >= sink, last, columns)], -1)
