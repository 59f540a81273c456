"""FlashAttention-4's block-sparse kernel behind the Triton backend's selection, where ``flash-attn-4`` is installed."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from stem_attention.backends.base import Request, qualified
from stem_attention.backends.triton.backend import TritonBackend
from stem_attention.backends.triton.layout import describable
from stem_attention.call import Call
from stem_attention.policies.base import Policy
from stem_attention.selection import BlockSelection

__all__ = ["FA4Backend"]


class FA4Backend(TritonBackend):
    """Selection and attention one after the other. Calls that FlashAttention-4 does not take run portably: see ``caveat``."""

    name = "fa4"
    only_by_name = "on Hopper the hopper backend is faster; only by name"
    caveat = (
        "packed batches, caches in pages, a first query inside a block, and addresses or strides that are no multiple of "
        "16 bytes run portably"
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
        """Say why a GPU will not do; None for compute capability 9.0. Read off flash-attn-4 4.0.0b36."""
        if torch.version.hip is not None:
            return "it needs compute capability 9.0 (Hopper)"
        major = torch.cuda.get_device_capability(device)[0]
        if major in (10, 11):
            return "FlashAttention-4's kernel for this card shares a list among 256 queries, a selection has one for each block"
        return None if major == 9 else "FlashAttention-4 has no kernel for this card that takes lists of blocks"

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
    """Tell whether FlashAttention-4 takes a call: its rows begin with the first query, and it copies from 16-byte addresses."""
    whole_rows = call.batch is None and (call.k.shape[1] - call.q.shape[1]) % block_size == 0
    return whole_rows and all(describable(x) for x in (call.q, call.k, call.v))
