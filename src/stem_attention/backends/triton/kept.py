"""Launches that turn a selection's lists into bits, and bits into lists by query block and by key block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stem_attention.backends.kept import WORD
from stem_attention.backends.triton.kept_kernels import columns_kernel, pack_kernel, rows_kernel
from stem_attention.backends.triton.layout import Layout
from stem_attention.backends.triton.program import Launches
from stem_attention.blocks import block_count

LEAST_CHUNK = 16
"""Entries of a key block's list that a program of its own is worth."""


@dataclass(frozen=True)
class Columns:
    """For each key block, the rows that keep it, cut into chunks of nearly equal work.

    Attributes:
        lists: int32, the entries of all key blocks; see ``columns_kernel``.
        starts: int32 ``(sequences * kv_heads * blocks * group + 1,)``, where the list of each begins, and the end.
        longest: int32 ``(1,)``, entries of a chunk at most.
        chunks: int32 ``(columns,)``, chunks of each key block of each kv head: 1 where nobody keeps it.
        firsts: int32 ``(columns,)``, its first chunk.
        owners: int32, the column that each chunk belongs to; beyond the last chunk the number of columns.
        slots: int32 ``(columns,)``, the place of its first partial sum; -1 for a column of a single chunk.
        room: Partial sums that there may be.
    """

    lists: Tensor
    starts: Tensor
    longest: Tensor
    chunks: Tensor
    firsts: Tensor
    owners: Tensor
    slots: Tensor
    room: int


def pack(layout: Layout, indices: Tensor, counts: Tensor, block_size: int, kept: Tensor, launches: Launches) -> None:
    """Set bits of ``kept (batch, q_heads, rows, words)``, which are 0 before; lists as attention takes them."""
    launches.start(
        pack_kernel, (layout.rows * layout.heads, layout.batch), indices, counts, kept, layout.cu_q, layout.cu_k,
        *kept.stride()[:2], layout.q_len, layout.kv_len, layout.heads, layout.rows, indices.shape[3], kept.shape[3],
        B=block_size, TILE=128, RAGGED=layout.packed, num_warps=1,
    )  # fmt: skip


def list_rows(kept: Tensor, blocks: int, most: int, launches: Launches) -> tuple[Tensor, Tensor]:
    """List the key blocks of each row, at most ``most`` in all: the lists, and where each begins, with the end."""
    batch, heads, rows, words = kept.shape
    lists, counts = _empty(kept, most), _empty(kept, batch * heads * rows)
    arguments = (*kept.stride()[:2], heads, rows, blocks, words)
    grid = (rows * heads, batch)
    launches.start(rows_kernel, grid, kept, counts, lists, *arguments, TILE=256, FILL=False, num_warps=1)
    starts = _starts(counts)
    launches.start(rows_kernel, grid, kept, starts, lists, *arguments, TILE=256, FILL=True, num_warps=1)
    return lists, starts


def list_columns(kept: Tensor, group: int, blocks: int, most: int, chunks: int, launches: Launches) -> Columns:
    """List the rows of each key block, at most ``most`` in all, and cut what would make more than 1 of ``chunks`` chunks."""
    batch, heads, rows, words = kept.shape
    lists, counts = _empty(kept, most), _empty(kept, batch * heads * blocks)
    grid, arguments = (block_count(blocks, WORD), heads, batch), (*kept.stride()[:2], heads, rows, blocks, words)
    launches.start(columns_kernel, grid, kept, counts, lists, *arguments, G=group, TILE=64, FILL=False, num_warps=4)
    starts = _starts(counts)
    launches.start(columns_kernel, grid, kept, starts, lists, *arguments, G=group, TILE=64, FILL=True, num_warps=4)
    totals = counts.view(-1, group).sum(1, dtype=torch.int32)
    longest = ((starts[-1:] + chunks - 1) // chunks).clamp(min=LEAST_CHUNK)
    number = ((totals + longest - 1) // longest).clamp(min=1)
    ends = number.cumsum(0, dtype=torch.int32)
    columns = len(number)
    # A chunk more than its share comes with each column at most.
    owners = torch.searchsorted(ends, torch.arange(columns + chunks, device=kept.device, dtype=torch.int32), right=True)
    several = torch.where(number > 1, number, 0)
    slots = torch.where(number > 1, several.cumsum(0, dtype=torch.int32) - several, -1)
    room = min(2 * chunks, 2 * (most // LEAST_CHUNK) + 1)
    return Columns(lists, starts, longest, number, ends - number, owners.to(torch.int32), slots, room)


def _empty(like: Tensor, size: int) -> Tensor:
    return torch.empty(max(1, size), dtype=torch.int32, device=like.device)


def _starts(counts: Tensor) -> Tensor:
    """Return where lists of these lengths begin that follow one another, and where the last one ends."""
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
