"""The pairs of blocks that a forward pass kept, one bit each: all that its gradient needs to know of a selection.

Lists take 32 bits for every block that a row *may* keep, and nobody knows on the host how many it does keep. Bits have a size
that is known beforehand, a small one, and lists by query block and by key block can be made of them alike.
"""

import torch
from torch import Tensor

from stem_attention.blocks import BlockGrid, block_count, most_rows
from stem_attention.call import Call
from stem_attention.selection import BlockSelection, padded_lists

WORD = 32
"""Key blocks whose bits one int32 holds, the first in its lowest bit."""


def kept_shape(call: Call) -> tuple[int, int, int, int]:
    """Return ``(sequences, q_heads, rows, words)``: room for the rows and key blocks of the largest sequence of a call."""
    size, batch = call.policy.block_size, call.batch
    if batch is None:
        grid = call.grid
        return call.q.shape[0], call.q.shape[2], grid.key_blocks - grid.first_row, block_count(grid.key_blocks, WORD)
    rows = most_rows(batch.max_q, size)
    return batch.sequences, call.q.shape[1], rows, block_count(block_count(batch.max_k, size), WORD)


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
