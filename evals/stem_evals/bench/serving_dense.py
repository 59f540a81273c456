"""Dense attention for chunks of prompts, on contiguous keys and values: what serving with Stem is timed against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stem_attention.backends.dense import dense_attention
from stem_evals.bench.serving_batches import Step

Run = Callable[[], list[Tensor]]
"""Reads all steps; gives every step's output, ``(tokens, heads, dim)``."""


def dense_runs(steps: list[Step]) -> dict[str, Callable[[], Run]]:
    """Dense contestants by name. On a GPU the fastest kernels that torch has for queries at the end of their keys.

    cuDNN's causal mask starts at the first key, whatever the lengths: it serves a chunk as two calls, over the cached keys
    and over the chunk's own, joined by their log-sum-exps.
    """
    if steps[0].page_table.device.type != "cuda":
        return {"dense SDPA": lambda: _each(steps, lambda q, k, v: dense_attention(q, k, v, q.shape[-1] ** -0.5))}
    return {"Flash": lambda: _packed(steps), "cuDNN SDPA, joined": lambda: _each(steps, joined)}


def _each(steps: list[Step], attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Run:
    """Chunk by chunk, batch 1."""
    return lambda: [torch.cat([attend(part.q, part.k, part.v)[0] for part in step.parts]) for step in steps]


def joined(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend by cuDNN to cached keys and to the queries' own, and join the two; shapes as in :func:`dense_attention`."""
    cached = k.shape[1] - q.shape[1]
    own = _cudnn(q, k[:, cached:], v[:, cached:], True)
    if cached == 0:
        return own[0].transpose(1, 2)
    before = _cudnn(q, k[:, :cached], v[:, :cached], False)
    share = torch.sigmoid(before[1] - own[1]).unsqueeze(-1)  # of the cached keys in the whole softmax
    return torch.lerp(own[0].float(), before[0].float(), share).to(q.dtype).transpose(1, 2)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Output ``(1, heads, q_len, dim)`` and log-sum-exp ``(1, heads, q_len)``."""
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, lse, *_ = attend(*(x.transpose(1, 2) for x in (q, k, v)), None, True, 0.0, causal)
    return out, lse.view(out.shape[:3])


def _packed(steps: list[Step]) -> Run:
    """FlashAttention as torch has it, every step in one launch; its causal mask ends at the last key."""
    calls = []
    for step in steps:
        q, *_, q_starts, k_starts, max_q, max_k = step.packed
        k, v = torch.cat([part.k[0] for part in step.parts]), torch.cat([part.v[0] for part in step.parts])
        calls.append((q, k, v, q_starts.to(q.device), k_starts.to(q.device), max_q, max_k, 0.0, True, False))
    return lambda: [torch.ops.aten._flash_attention_forward(*call)[0] for call in calls]
