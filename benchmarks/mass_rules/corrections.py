"""Two corrections of the output that were tried with Mass's blocks: a dense row in 64, and means of the dropped blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from stem_attention.integrations.transformers import attention as host
from stem_attention.policies.metric import runs

Attend = Callable[..., Tensor]

# Logits held at a time, in elements.
_WORKSPACE = 1 << 26


@contextmanager
def corrected(kind: str | None) -> Iterator[None]:
    """Run every sparse layer of transformers with a correction: None, ``"delta"`` or ``"residual"``."""
    plain = host.block_sparse_attention
    if kind is not None:
        host.block_sparse_attention = {"delta": delta, "residual": residual}[kind](plain)
    try:
        yield
    finally:
        host.block_sparse_attention = plain


def plain_only(scores: dict[str, object]) -> None:
    """Refuse a model whose scores are not plain products: the corrections know neither sinks nor caps."""
    if given := [name for name, value in scores.items() if value is not None]:
        raise ValueError(f"the corrections are for models without {' and '.join(given)}")


def delta(plain: Attend, every: int = 64) -> Attend:
    """Add to 64 rows what one dense row among them differs by: Delta Attention, arXiv 2505.11254."""

    def attend(q: Tensor, k: Tensor, v: Tensor, selection, *, scale: float | None = None, **others: object) -> Tensor:
        plain_only(others)
        out = plain(q, k, v, selection, scale=scale)
        length, heads, group = q.shape[1], q.shape[2], q.shape[2] // k.shape[2]
        if length != k.shape[1]:
            return out
        rows = torch.arange(0, length, every, device=q.device)
        factor = q.shape[3] ** -0.5 if scale is None else scale
        keys, values = (x.transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))
        exact = []
        for part in rows.split(max(1, 2 * _WORKSPACE // (heads * length))):
            end = int(part[-1]) + 1
            logits = (q[:, part].transpose(1, 2) @ keys[:, :, :end].mT).float() * factor
            logits.masked_fill_(torch.arange(end, device=q.device) > part[:, None], -torch.inf)
            exact.append((logits.softmax(-1).to(v.dtype) @ values[:, :, :end]).transpose(1, 2))
        change = (torch.cat(exact, 1).float() - out[:, rows].float()).repeat_interleave(every, 1)[:, :length]
        return (out.float() + change).to(out.dtype)

    return attend


def residual(plain: Attend) -> Attend:
    """Let every dropped block take part by its mean key, its mean value and its count."""

    def attend(q: Tensor, k: Tensor, v: Tensor, selection, *, scale: float | None = None, **others: object) -> Tensor:
        plain_only(others)
        out, lse = plain(q, k, v, selection, scale=scale, return_lse=True)
        length, heads, group, size = q.shape[1], q.shape[2], q.shape[2] // k.shape[2], selection.block_size
        if length != k.shape[1]:
            return out
        factor = q.shape[3] ** -0.5 if scale is None else scale
        sums = [runs(x, 0, size, size).sum(2, dtype=torch.float32) for x in (k, v)]
        blocks = sums[0].shape[1]
        counts = (torch.arange(blocks * size, device=q.device) < length).view(-1, size).sum(1).float()
        keys, values = ((x / counts[:, None, None]).transpose(1, 2).repeat_interleave(group, 1) for x in sums)
        kept, columns, result = selection.to_mask(), torch.arange(blocks, device=q.device), torch.empty_like(out)
        step = max(1, _WORKSPACE // (heads * blocks * size))
        for first in range(0, blocks, step):
            stop = min(first + step, blocks)
            low, high = first * size, min(stop * size, length)
            logits = q[:, low:high].transpose(1, 2).float() @ keys.mT * factor + counts.log()
            dropped = ~kept[:, :, first:stop] & (columns < torch.arange(first, stop, device=q.device)[:, None])
            dropped = dropped.repeat_interleave(size, 2)[:, :, : high - low]
            logits = logits.masked_fill(~dropped, -torch.inf)
            rest, here = logits.logsumexp(-1, keepdim=True), lse[:, :, low:high, None]
            means = (logits - rest.clamp(min=-1e30)).exp() @ values
            total = torch.logaddexp(rest, here.to(rest))
            exact = out[:, low:high].transpose(1, 2).float()
            result[:, low:high] = (exact * (here - total).exp() + means * (rest - total).exp()).transpose(1, 2).to(out.dtype)
        return result

    return attend
