"""Lists that several query blocks share, as FlashAttention-4's kernel for Blackwell reads them."""

from typing import Any

import torch
from torch import Tensor

from stem_attention.selection import BlockSelection, lists_of


def shared_lists(selection: BlockSelection, queries: int, keys: int) -> tuple[dict[str, Any], Tensor]:
    """Gather the blocks of a selection into tiles of ``queries`` by ``keys`` tokens, multiples of its block size.

    A tile is *full* where every block in it is kept and lies before the tile's first query, and *partial* where some are kept.

    Returns:
        The fields of FlashAttention-4's ``BlockSparseTensorsTorch``; and what a mask over a partial tile has to look up: uint8
        ``(batch, q_heads, rows, key_blocks)``, 1 where a block is kept.
    """
    kept, size, start = selection.to_mask(), selection.block_size, selection.grid.start
    tall, wide = queries // size, keys // size
    padded = torch.nn.functional.pad(kept, (0, -kept.shape[3] % wide, 0, -kept.shape[2] % tall))
    tiles = padded.view(*kept.shape[:2], padded.shape[2] // tall, tall, padded.shape[3] // wide, wide)
    first = torch.arange(tiles.shape[2], device=kept.device) * queries + start
    end = torch.arange(1, tiles.shape[4] + 1, device=kept.device) * keys
    full = tiles.all(5).all(3) & (end <= first[:, None])
    partial = tiles.any(5).any(3) & ~full
    names = ("mask_block_cnt", "mask_block_idx", "full_block_cnt", "full_block_idx")
    fields = dict(zip(names, (*lists_of(partial), *lists_of(full)), strict=True))
    return {**fields, "block_size": (queries, keys)}, kept.view(torch.uint8)
