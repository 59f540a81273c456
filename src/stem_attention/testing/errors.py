"""How wrong a result is: against fp64, and beside what torch's own attention loses on the same problem."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# All but cuDNN, which keeps a plan for every shape it meets: hundreds of megabytes of a long soak's memory.
_JUDGES = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def relative_error(out: Tensor, ref: Tensor) -> float:
    """``|out - ref| / |ref|`` (2-norms of the whole tensors, fp64). 0 when both are empty or zero; NaN stays NaN."""
    difference = torch.linalg.vector_norm(out.double() - ref.double()).item()
    return difference / torch.linalg.vector_norm(ref.double()).item() if difference else 0.0


def worst_row_error(out: Tensor, ref: Tensor) -> float:
    """The largest relative error of a row along the last dimension, so that large rows cannot hide small ones."""
    if ref.numel() == 0:
        return 0.0
    difference = torch.linalg.vector_norm(out.double() - ref.double(), dim=-1)
    length = torch.linalg.vector_norm(ref.double(), dim=-1)
    return torch.where(difference == 0, 0.0, difference / length).max().item()


def exact_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Masked attention in fp64, nothing clever. Needs ``q_len * kv_len`` numbers per head.

    Args:
        q: ``(batch, q_len, q_heads, dim)``.
        k: ``(batch, kv_len, kv_heads, dim)``; query head ``h`` reads kv head ``h // (q_heads // kv_heads)``.
        v: The shape of ``k``.
        mask: Bool, broadcasts to ``(batch, q_heads, q_len, kv_len)``; see :func:`stem_attention.testing.token_mask`.
        scale: Softmax scale, ``1 / sqrt(dim)`` unless given.

    Returns:
        ``out`` of ``q``'s shape and the natural log-sum-exp ``(batch, q_heads, q_len)``, both fp64.
    """
    (batch, q_len, heads, dim), kv_heads = q.shape, k.shape[2]
    # The queries of a group side by side: keys and values need not be repeated.
    queries = q.double().transpose(1, 2).reshape(batch, kv_heads, -1, dim)
    keys, values = (x.double().transpose(1, 2) for x in (k, v))
    scores = (queries @ keys.mT).view(batch, heads, q_len, -1) * (dim**-0.5 if scale is None else scale)
    scores = scores.masked_fill(~mask, -torch.inf)
    out = (scores.softmax(-1).view(batch, kv_heads, -1, k.shape[1]) @ values).view(batch, heads, q_len, dim)
    return out.transpose(1, 2), scores.logsumexp(-1)


def error_against_sdpa(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None
) -> tuple[float, float]:
    """Worst row errors against fp64 of ``out`` and of torch's ``scaled_dot_product_attention``, on the same inputs.

    Arguments as in :func:`exact_attention`. FlashAttention's own bound is twice the second.
    """
    exact, _ = exact_attention(q, k, v, mask, scale)
    with sdpa_kernel(_JUDGES):
        sdpa = torch.nn.functional.scaled_dot_product_attention(*_heads_first(q, k, v), attn_mask=mask, scale=scale)
    return worst_row_error(out, exact), worst_row_error(sdpa.transpose(1, 2), exact)


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(batch, q_heads, length, dim)`` of all three, kv heads repeated: what every attention understands."""
    group = q.shape[2] // k.shape[2]
    return (
        q.transpose(1, 2),
        k.transpose(1, 2).repeat_interleave(group, 1),
        v.transpose(1, 2).repeat_interleave(group, 1),
    )
