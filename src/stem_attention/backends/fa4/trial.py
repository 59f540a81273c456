"""A trial of FlashAttention-4's kernel, which it must pass before ``auto`` chooses it on a card where nobody has run it."""

from functools import cache

import torch

from stem_attention.backends.base import Request
from stem_attention.backends.triton.backend import TritonBackend
from stem_attention.call import Call
from stem_attention.policies.mass import Mass

_TOKENS = 1000  # no multiple of a block or of a tile
_WORST = 1e-2  # of the results' norm; two kernels in bf16 differ by some 3e-3


@cache
def obstacle(request: Request) -> str | None:
    """Say what is wrong with FlashAttention-4's result for a small problem; None where it is the portable kernel's.

    A process asks once for each request, which waits for the device. What is compiled here is what the first call needs.
    """
    draw = torch.Generator(request.device).manual_seed(0)
    q, k, v = (
        torch.randn(1, _TOKENS, heads, request.head_dim, device=request.device, generator=draw).to(request.dtype)
        for heads in (4, 2, 2)
    )
    policy = Mass(share=16.0, block_size=request.block_size)  # drops blocks of random inputs as well
    call = Call(q, k, v, policy, request.head_dim**-0.5, _TOKENS, return_lse=True)
    portable = TritonBackend()
    selection = portable.select(call)
    try:
        from stem_attention.backends.fa4.attention import attend

        theirs = attend(call, selection)
    except Exception as error:  # noqa: BLE001  whatever a package of other people raises on a card that it does not know
        return f"FlashAttention-4 failed when it was tried on this card ({type(error).__name__}: {error}); only by name"
    for one, other in zip(theirs, portable.attend(call, selection), strict=True):
        off = float((one.float() - other.float()).norm() / other.float().norm())
        if not off <= _WORST:  # NaN is wrong too
            return f"FlashAttention-4's result was off by {off:.1g} when it was tried on this card; only by name"
    return None
