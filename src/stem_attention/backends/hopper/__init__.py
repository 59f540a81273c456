"""Attention and keeping by mass for Hopper, in Gluon, Triton's lower-level language; the rest is the Triton backend's."""

import torch
from torch import Tensor

from stem_attention.backends.base import Results
from stem_attention.backends.triton.backend import BLOCK_SIZES, AttentionKernel, Selector, TritonBackend, check_grid
from stem_attention.backends.triton.layout import LEAST_BOX
from stem_attention.backends.triton.program import Launches
from stem_attention.call import Call
from stem_attention.policies.base import Policy
from stem_attention.policies.mass import Mass

__all__ = ["BLOCK_SIZES", "HEAD_DIMS", "HopperBackend"]

HEAD_DIMS = {64: 64, 128: 128, 192: 128, 256: 256}
"""Dimensions of queries and keys that are served, and that of values beside each."""


class HopperBackend(TritonBackend):
    """Warp-specialised attention behind the Triton backend's selection.

    Calls that the copy engine cannot serve run the portable kernel instead: what ``caveat`` says, and strides of 0.
    """

    name = "hopper"
    caveat = "windows, addresses and strides that are no multiple of 16 bytes, and strides of 0, run portably"
    # H100: at 8192 tokens the whole call beats cuDNN 3.1x (32/8/128), 2.8x (32/8/64), 2.7x (8/4/256); shorter ones gain too,
    # but attention is little of such a prefill (docs/kernels-record.md).
    crossover = 8192
    head_dims = HEAD_DIMS
    head_dims_said = "64, 128, 192 or 256"

    def card_obstacle(self, device: torch.device) -> str | None:
        """Say why a GPU will not do; None for compute capability 9.0."""
        fits = torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)
        return None if fits else "it needs compute capability 9.0 (Hopper)"

    def value_obstacle(self, head_dim: int, value_dim: int) -> str | None:
        """Say which dimension values must have beside such keys; None when they have it."""
        expected = HEAD_DIMS[head_dim]
        return None if value_dim == expected else f"value_dim must be {expected} where head_dim is {head_dim}, not {value_dim}"

    def fused(self, call: Call) -> tuple[Tensor, Tensor]:
        """Select and attend; keys in pages that the copy engine does not take are packed first."""
        if call.paged and call.k.shape[1] % LEAST_BOX:
            from stem_attention.backends.triton.packing import packed

            call = call.with_packed(*packed(call, Launches()))
        return super().fused(call)

    def selector(self, policy: Policy) -> Selector | None:
        """Return the fast selection for a policy: by mass with the Hopper kernel, else as the Triton backend."""
        if type(policy) is not Mass:
            return super().selector(policy)
        from stem_attention.backends.hopper.mass import select_by_mass

        return select_by_mass

    def kernel(self, call: Call) -> AttentionKernel:
        """Return the Hopper kernel's launch, or the portable one's for windows and where the copy engine will not do."""
        from stem_attention.backends.hopper.attention import attend, can_copy

        return attend if call.window is None and can_copy(call) else super().kernel(call)

    def backward(self, call: Call, kept: Tensor, results: Results, d_results: Results) -> tuple[Tensor, Tensor, Tensor]:
        """Run the gradient's kernels; that of keys and values is Hopper's own where the copy engine will do."""
        from stem_attention.backends.hopper.backward import start_chunks
        from stem_attention.backends.triton.backward import backward

        check_grid(call)
        return backward(call, kept, results, d_results, Launches(), start_chunks)
