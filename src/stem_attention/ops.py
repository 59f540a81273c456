"""The library as torch operators, so that torch.compile sees three opaque calls with known shapes.

Operators take no dataclasses: a config travels as its JSON text and a selection as its two tensors.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from stem_attention.backends import Backend, Request, get_backend
from stem_attention.backends.dense import dense_attention, keep_everything
from stem_attention.config import StemConfig
from stem_attention.policies.budget import block_count, row_budgets
from stem_attention.selection import BlockSelection

_parse = lru_cache(maxsize=256)(StemConfig.from_json)


def _backend(q: Tensor, block_size: int, name: str) -> Backend:
    return get_backend(Request(q.device, q.dtype, q.shape[3], block_size), name)


@torch.library.custom_op("stem_attention::forward", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, config: str, scale: float, prompt_len: int, return_lse: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Select and attend; ``lse`` is empty unless asked for."""
    settings = _parse(config)
    chosen = _backend(q, settings.block_size, backend)
    if q.shape[1] == 0:
        return torch.empty_like(q), q.new_empty((q.shape[0], q.shape[2], 0), dtype=torch.float32)
    if prompt_len < settings.dense_below and not return_lse:
        return dense_attention(q, k, v, scale).contiguous(), q.new_empty(0, dtype=torch.float32)
    if prompt_len < settings.dense_below:
        selection = keep_everything(q, k, settings.block_size)
    else:
        selection = chosen.select(q, k, v, settings, scale, prompt_len)
    out, lse = chosen.attend(q, k, v, selection, scale)
    return out, lse if return_lse else q.new_empty(0, dtype=torch.float32)


@forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, config: str, scale: float, prompt_len: int, return_lse: bool, backend: str
) -> tuple[Tensor, Tensor]:
    shape = (q.shape[0], q.shape[2], q.shape[1]) if return_lse else (0,)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("stem_attention::select", mutates_args=())
def select(q: Tensor, k: Tensor, v: Tensor, config: str, scale: float, prompt_len: int, backend: str) -> tuple[Tensor, Tensor]:
    """Indices and counts of the blocks that a config keeps."""
    settings = _parse(config)
    selection = _backend(q, settings.block_size, backend).select(q, k, v, settings, scale, prompt_len)
    return selection.indices, selection.counts


@select.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, config: str, scale: float, prompt_len: int, backend: str) -> tuple[Tensor, Tensor]:
    size = _parse(config).block_size
    first, end = (k.shape[1] - q.shape[1]) // size, block_count(k.shape[1], size)
    if isinstance(prompt_len, int) and isinstance(end, int) and isinstance(first, int):
        rows = end - first if q.shape[1] else 0
        width = max(row_budgets(_parse(config), block_count(prompt_len, size))[first:end], default=0) if rows else 0
    else:  # symbolic lengths: the widest row is known only when the call runs
        rows, width = end - first, torch.library.get_ctx().new_dynamic_size()
    shape = (q.shape[0], q.shape[2], rows)
    return q.new_empty((*shape, width), dtype=torch.int32), q.new_empty(shape, dtype=torch.int32)


@torch.library.custom_op("stem_attention::attend", mutates_args=())
def attend(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, block_size: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Attention over given blocks."""
    selection = BlockSelection(indices, counts, block_size, q.shape[1], k.shape[1])
    if q.device.type == "cpu":  # on a GPU this would wait for the device; kernels guard their own reads
        selection.validate()
    return _backend(q, block_size, backend).attend(q, k, v, selection, scale)


@attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, block_size: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse
