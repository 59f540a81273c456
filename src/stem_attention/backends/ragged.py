"""The borders of a packed batch on the device, for the backends that run it in one launch."""

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
