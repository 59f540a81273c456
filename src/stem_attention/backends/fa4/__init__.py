"""FlashAttention-4's block-sparse kernel behind the Triton backend's selection, where ``flash-attn-4`` is installed."""

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from stem_attention.backends.base import Request, qualified
from stem_attention.backends.triton.backend import TritonBackend
from stem_attention.backends.triton.layout import describable
from stem_attention.blocks import BlockGrid
from stem_attention.call import Call
from stem_attention.policies.base import Policy
from stem_attention.selection import BlockSelection

__all__ = ["FA4Backend"]

_MOST_PAIRS = 1 << 30  # of a query block and a key block, a byte and more each where lists are shared


class FA4Backend(TritonBackend):
    """Selection and attention one after the other. Calls that FlashAttention-4 does not take run portably: see ``caveat``."""

    name = "fa4"
    caveat = (
        "gradients, sinks, soft caps, values of another dimension, packed batches, caches in pages, a first query inside a "
        "block, addresses or strides that are no multiple of 16 bytes, and more than 2^30 pairs of blocks run portably"
    )
    head_dims = range(16, 129, 8)  # above, FlashAttention-4's tiles of keys do not divide a block
    head_dims_said = "a multiple of 8 between 16 and 128"

    def why_not(self, request: Request) -> str | None:
        """It takes what the Triton backend takes, but for larger heads and other cards."""
        try:
            version("flash-attn-4")
        except PackageNotFoundError:
            return "flash-attn-4 is not installed: pip install flash-attn-4"
        return super().why_not(request)

    def card_obstacle(self, device: torch.device) -> str | None:
        """Say why a GPU will not do; None where flash-attn-4 (read at 4.0.0b36) has a kernel that takes lists of blocks."""
        fits = torch.version.hip is None and torch.cuda.get_device_capability(device)[0] in (9, 10, 11)
        return None if fits else "FlashAttention-4 takes lists of blocks on compute capability 9, 10 and 11 alone"

    def only_by_name(self, request: Request) -> str | None:
        """Leave Hopper to the hopper backend, and other cards to FlashAttention-4 once a trial has shown it right there."""
        if torch.cuda.get_device_capability(request.device)[0] == 9:
            return "the library's own kernels are faster on Hopper; only by name"
        from stem_attention.backends.fa4.trial import obstacle

        index = torch.cuda.current_device() if request.device.index is None else request.device.index
        return obstacle(replace(request, device=torch.device("cuda", index), value_dim=None))  # other values run portably

    def path(self, policy: Policy) -> tuple[str, ...]:
        """Name what selects and what attends; see :meth:`Backend.path`."""
        select: Callable[..., object] = self.selector(policy) or type(policy).__call__
        computes = f"{qualified(select)} and {type(self).__module__}.attention.attend"
        return qualified(self.forward), f"{qualified(self.select)} and {qualified(self.attend)}", computes

    def runner(self, call: Call) -> Callable[[Call], tuple[Tensor, Tensor]]:
        """Return :meth:`forward` where FlashAttention-4 attends, else what the Triton backend runs."""
        return self.forward if _takes(call, call.policy.block_size) else super().runner(call)

    def attend(self, call: Call, selection: BlockSelection) -> tuple[Tensor, Tensor]:
        """Run FlashAttention-4, or the portable kernel."""
        if not _takes(call, selection.block_size):
            return super().attend(call, selection)
        from stem_attention.backends.fa4.attention import attend

        return attend(call, selection)


def _takes(call: Call, block_size: int) -> bool:
    """Tell whether FlashAttention-4 takes a call.

    Its scores are plain and its values as wide as its keys, its rows begin with the first query, and it copies from 16-byte
    addresses.
    """
    if not call.plain or call.v.shape[-1] != call.q.shape[-1]:
        return False
    if call.batch is not None or (call.k.shape[1] - call.q.shape[1]) % block_size:
        return False
    grid = BlockGrid.of(call.q, call.k, block_size)
    pairs = call.q.shape[0] * call.q.shape[2] * grid.rows * grid.key_blocks
    return pairs <= _MOST_PAIRS and all(describable(x) for x in (call.q, call.k, call.v))
