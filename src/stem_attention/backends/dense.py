"""Dense causal attention with the queries aligned to the end of the keys, for prompts too short to gain from sparsity."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from stem_attention.selection import BlockSelection


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """``(batch, q_len, q_heads, dim)`` by torch's own ``scaled_dot_product_attention``."""
    square = q.shape[1] == k.shape[1]
    out: Tensor = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if square else causal_lower_right(q.shape[1], k.shape[1]),
        is_causal=square,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def keep_everything(q: Tensor, k: Tensor, block_size: int) -> BlockSelection:
    """The selection under which block-sparse attention is dense causal attention."""
    (batch, q_len, heads, _), kv_len = q.shape, k.shape[1]
    first, end = (kv_len - q_len) // block_size, -(-kv_len // block_size)
    rows = torch.arange(first, end if q_len else first, device=q.device, dtype=torch.int32)
    ids = torch.arange(end if q_len else 0, device=q.device, dtype=torch.int32)
    indices = torch.where(ids <= rows[:, None], ids, -1).to(torch.int32).expand(batch, heads, -1, -1)
    counts = (rows + 1).expand(batch, heads, -1)
    return BlockSelection(indices.contiguous(), counts.contiguous(), block_size, q_len, kv_len)
