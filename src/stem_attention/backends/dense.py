"""Dense causal attention with the queries aligned to the end of the keys, for prompts too short to gain from sparsity."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Keep results in the precision of their inputs. Costs nothing where autocast is off, as it is nearly always."""
    kind = device.type
    on = kind != "meta" and torch.is_autocast_enabled(kind)  # meta tensors know no autocast
    return torch.autocast(kind, enabled=False) if on else nullcontext()


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Compute ``(batch, q_len, q_heads, value_dim)`` by torch's own ``scaled_dot_product_attention``."""
    square, grouped = q.shape[1] == k.shape[1], q.shape[2] != k.shape[2]
    mask = None
    if not square:
        from torch.nn.attention.bias import causal_lower_right  # loads torch.compile: seconds, so not at import

        mask = causal_lower_right(q.shape[1], k.shape[1])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with without_autocast(q.device):
        out: Tensor = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=square, scale=scale, enable_gqa=grouped
        )
    return out.transpose(1, 2).contiguous()
