"""Keys or values of a paged cache, packed."""

import torch
from torch import Tensor

from stem_attention.call import PackedBatch


def packed(cache: Tensor, scale: Tensor, batch: PackedBatch, dtype: torch.dtype) -> Tensor:
    """Return those of all sequences, ``(total_k, kv_heads, dim)``: each number times its scale, rounded once.

    Args:
        cache: fp8 ``(pages, page_size, kv_heads, dim)``.
        scale: fp32, one number or ``(kv_heads,)``.
        batch: Where each sequence's pages are.
        dtype: What to return.
    """
    raw = cache.view(torch.uint8)  # torch indexes no fp8
    rows = torch.cat([batch.sequence(raw, i) for i in range(batch.sequences)]).view(cache.dtype)
    return (rows.float() * scale.view(-1, 1)).to(dtype)
