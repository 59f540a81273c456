"""Dense causal attention with the queries aligned to the end of the keys, for prompts too short to gain from sparsity."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Inside, results keep the precision of their inputs. Costs nothing where autocast is off, as it is nearly always."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """``(batch, q_len, q_heads, dim)`` by torch's own ``scaled_dot_product_attention``."""
    square = q.shape[1] == k.shape[1]
    with without_autocast(q.device):
        out: Tensor = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=None if square else _bottom_right(q.shape[1], k.shape[1]),
            is_causal=square,
            scale=scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
    return out.transpose(1, 2).contiguous()


def _bottom_right(q_len: int, kv_len: int) -> Tensor:
    from torch.nn.attention.bias import causal_lower_right  # loads torch.compile: seconds, so not at import

    mask: Tensor = causal_lower_right(q_len, kv_len)
    return mask
