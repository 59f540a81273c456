"""The pairs of blocks that a forward pass kept, one bit each: all that its gradient needs to know of a selection.

Lists take 32 bits for every block that a row *may* keep, and nobody knows on the host how many it does keep. Bits have a size
that is known beforehand, a small one, and lists by query block and by key block can be made of them alike.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from stem_attention.blocks import BlockGrid, block_count, most_rows
from stem_attention.call import Call
from stem_attention.selection import BlockSelection, padded_lists

WORD = 32
"""Key blocks whose bits one int32 holds, the first in its lowest bit."""


def kept_shape(
    q: Tensor, k: Tensor, block_size: int, q_starts: Sequence[int] | None = None, k_starts: Sequence[int] | None = None
) -> tuple[int, int, int, int]:
    """Return ``(sequences, q_heads, rows, words)``: room for the rows and key blocks of the largest sequence of a call."""
    if q_starts is None or k_starts is None:
        grid = BlockGrid.of(q, k, block_size)
        return q.shape[0], q.shape[2], grid.key_blocks - grid.first_row, block_count(grid.key_blocks, WORD)
    most_q, most_k = (max((end - start for start, end in pairwise(starts)), default=0) for starts in (q_starts, k_starts))
    words = block_count(block_count(most_k, block_size), WORD)
    return len(q_starts) - 1, q.shape[1], most_rows(most_q, block_size), words


def nothing_kept(call: Call) -> Tensor:
    """Return the bits of a call that keeps nothing yet, int32 of the shape of :func:`kept_shape`."""
    starts = () if call.batch is None else (call.batch.q_starts, call.batch.k_starts)
    shape = kept_shape(call.q, call.k, call.policy.block_size, *starts)
    return torch.zeros(shape, dtype=torch.int32, device=call.q.device)


def pack(selection: BlockSelection) -> Tensor:
    """Return the bits of a selection, int32 ``(batch, q_heads, rows, words)``."""
    mask = selection.to_mask()
    bits = torch.unflatten(torch.nn.functional.pad(mask, (0, -mask.shape[3] % WORD)), 3, (-1, WORD))
    powers = 2 ** torch.arange(WORD, device=mask.device)
    return (bits * powers).sum(-1).to(torch.int32)  # wraps around: the highest bit is the sign


def unpack(words: Tensor, grid: BlockGrid) -> BlockSelection:
    """Return the selection of these bits, of which there may be more than the grid has rows and key blocks."""
    words, columns = words[:, :, : grid.rows], torch.arange(grid.key_blocks, dtype=torch.int32, device=words.device)
    mask = (words[..., (columns // WORD).long()] >> columns % WORD) & 1 != 0
    return BlockSelection(*padded_lists(mask), grid.block_size, grid.q_len, grid.kv_len)
