"""A trial of FlashAttention-4's kernel, which it must pass before ``auto`` chooses it on a card where nobody has run it."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Lock

import torch

from stem_attention.backends.base import Request
from stem_attention.backends.triton.backend import TritonBackend
from stem_attention.call import Call
from stem_attention.policies.mass import Mass

_TOKENS = 1000  # no multiple of a block or of a tile
_WORST = 1e-2  # of the results' norm; two kernels in bf16 differ by some 3e-3
_TURN = Lock()


def obstacle(request: Request) -> str | None:
    """Say what is wrong with FlashAttention-4's result for a small problem; None where it is the portable kernel's.

    A process asks once for each request, which waits for the device, and keeps to the answer: calls run what they ran first,
    and :func:`stem_attention.explain` says the same. What is compiled here is what the first call needs.
    """
    with _TURN:  # or threads that ask at once would each hold a trial
        return _answer(request)


@cache
def _answer(request: Request) -> str | None:
    on_gpu = request.device.type == "cuda"
    if torch.compiler.is_compiling() or (on_gpu and torch.cuda.is_current_stream_capturing()):
        return "FlashAttention-4 is not tried while a graph is made, and was not before; only by name"
    # The caller's autocast, vmap, fake tensors and modes end at its thread, and would change the trial or forbid it.
    with ThreadPoolExecutor(1) as aside:
        return aside.submit(_try, request).result()


def _try(request: Request) -> str | None:
    torch.get_device_module(request.device).set_device(request.device)  # kernels start on the current one, the thread's own
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
