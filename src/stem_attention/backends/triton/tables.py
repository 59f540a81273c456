"""Small tables of numbers that kernels read: copied to a device without waiting for it, and kept there."""

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor

from stem_attention.call import to_device

# Tables by layer of the largest models, and for some lengths beside.
_KEPT = 256


def device_table(rows: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make ``(rows, longest)``, shorter rows padded with 0."""
    longest = max(map(len, rows))
    return to_device([[*row, *[0] * (longest - len(row))] for row in rows], dtype, device)


def kept_per_stream(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Call ``make(device, *args)`` once for each device, stream and arguments, for what the current stream runs next.

    Another stream could read a table before it is copied, or after its memory has been given away.
    """

    @lru_cache(maxsize=_KEPT)
    def kept(stream: int, device: torch.device, *args: Any) -> Tensor:
        return make(device, *args)

    @wraps(make)
    def table(device: torch.device, *args: Any) -> Tensor:
        if device.type != "cuda":
            return kept(0, device, *args)
        # A captured copy runs at replay: the table belongs to the graph, and nobody else may read it.
        if torch.cuda.is_current_stream_capturing():
            return make(device, *args)
        return kept(torch.cuda.current_stream(device).cuda_stream, device, *args)

    return table
