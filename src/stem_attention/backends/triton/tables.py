"""Small tables of numbers that kernels read: copied to a device without waiting for it, and kept there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor

# Tables by layer of the largest models, and for some lengths beside.
_KEPT = 256


def device_table(rows: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``(rows, longest)``, shorter rows padded with 0."""
    longest = max(map(len, rows))
    padded = [[*row, *[0] * (longest - len(row))] for row in rows]
    return torch.tensor(padded, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def kept_per_stream(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Call ``make(device, *args)`` once for each device, stream and arguments, for what the current stream runs next.

    Another stream could read a table before it is copied, or after its memory has been given away.
    """

    @lru_cache(maxsize=_KEPT)
    def kept(stream: int, device: torch.device, *args: Any) -> Tensor:
        return make(device, *args)

    @wraps(make)
    def table(device: torch.device, *args: Any) -> Tensor:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # A captured copy runs at replay: the table belongs to the graph, and nobody else may read it.
            return make(device, *args)
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        return kept(stream, device, *args)

    return table
