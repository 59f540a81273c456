"""What launches of the attention kernels share: a packed batch's borders on the device, the copy engine's terms, results."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from stem_attention.backends.base import Packing


@dataclass(frozen=True)
class Ragged:
    """A packed batch on the device: int32 cumulative lengths, and the longest lengths, which size the grid."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int

    @classmethod
    def of(cls, packing: Packing, device: torch.device) -> Ragged:
        """Copy the borders to a device without waiting for it."""
        starts = torch.tensor([list(packing.q_starts), list(packing.k_starts)], dtype=torch.int32)
        cu_q, cu_k = (starts.pin_memory() if device.type == "cuda" else starts).to(device, non_blocking=True)
        longest = (max((b - a for a, b in pairwise(x)), default=0) for x in (packing.q_starts, packing.k_starts))
        return cls(cu_q, cu_k, *longest)

    @property
    def sequences(self) -> int:
        """Sequences in the batch."""
        return self.cu_q.shape[0] - 1


def describable(x: Tensor) -> bool:
    """Tensor descriptors want 16-byte aligned addresses and strides, and not the strides of 0 that expanded tensors have."""
    aligned = all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
    return aligned and x.data_ptr() % 16 == 0 and x.stride(-1) == 1


def empty_results(q: Tensor, packed: bool, return_lse: bool) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Room for what a kernel writes.

    Returns:
        ``out`` like ``q``; fp32 ``lse``, ``(batch, q_heads, q_len)`` or ``(q_heads, total_q)`` if packed, empty unless asked
        for; and its strides by batch entry and head.
    """
    heads, out = q.shape[-2], torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if packed:
        lse = q.new_empty((heads, q.shape[0]) if return_lse else (0, 0), dtype=torch.float32)
        return out, lse, (0, lse.stride(0))
    lse = q.new_empty((q.shape[0], heads, q.shape[1]) if return_lse else (0, 0, 0), dtype=torch.float32)
    return out, lse, (lse.stride(0), lse.stride(1))
