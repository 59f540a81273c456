"""Describe what Stem is timed against: dense attention, and block-sparse attention over the same lists."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stem_attention import BlockSelection

_T = TypeVar("_T")
Peer = Callable[[], Callable[[], _T]]
"""Prepare what needs no timing and return the call to time. Raises :class:`LeftOutError` when there is none."""

STEM = "Stem"
EAGER = "eager Stem"
FLEX = "FlexAttention"


class LeftOutError(Exception):
    """Say why a peer is not timed, as a clause."""


def admit(
    peers: Mapping[str, Peer[_T]], problem: Callable[[_T], str | None]
) -> tuple[dict[str, Callable[[], _T]], dict[str, str]]:
    """Prepare and run every peer once; ``problem`` says what is wrong with a result, or None.

    Returns:
        Calls of the peers that ran and are right, and for each other one the reason why it is left out.
    """
    calls, left_out = {}, {}
    for name, peer in peers.items():
        call, reason = _try(peer, problem)
        if call is None:
            left_out[name] = reason
        else:
            calls[name] = call
    return calls, left_out


def _try(peer: Peer[_T], problem: Callable[[_T], str | None]) -> tuple[Callable[[], _T] | None, str]:
    try:
        call = peer()
        wrong = problem(call())
    except LeftOutError as error:
        return None, str(error)
    except torch.OutOfMemoryError:
        return None, "out of memory"
    except (RuntimeError, ValueError, AssertionError) as error:  # what kernels raise that do not take a shape
        first_line = (str(error).strip().splitlines() or ["no message"])[0]
        return None, f"cannot run: {type(error).__name__}: {first_line}"
    return (call, "") if wrong is None else (None, f"wrong: {wrong}")


def dense_peers(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Peer[Tensor]]:
    """Causal attention as torch runs it; on a GPU the fastest kernels that there are, by name."""
    if q.device.type != "cuda":
        return {"dense SDPA": lambda: partial(_sdpa, q, k, v)}
    return {
        "cuDNN SDPA": lambda: partial(sdpa_by, SDPBackend.CUDNN_ATTENTION, q, k, v),
        "Flash SDPA": lambda: partial(sdpa_by, SDPBackend.FLASH_ATTENTION, q, k, v),
        "FlashAttention-4": lambda: _flash_attention_4(q, k, v),
    }


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out: Tensor = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def sdpa_by(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend densely by one of torch's kernels; RuntimeError where it cannot."""
    with sdpa_kernel(kernel):
        return _sdpa(q, k, v)


def _flash_attention_4(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    try:
        attend = importlib.import_module("flash_attn.cute").flash_attn_func
    except ModuleNotFoundError as error:
        raise LeftOutError("not installed") from error
    except ImportError as error:
        raise LeftOutError(f"installed, but does not load: {error}") from error

    def run() -> Tensor:
        result = attend(q, k, v, causal=True)
        out: Tensor = result[0] if isinstance(result, tuple) else result  # some versions add the log-sum-exp
        return out

    return run


def flex_peer(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection) -> Callable[[], Tensor]:
    """FlexAttention over the lists of ``selection``, compiled: eager FlexAttention runs dense whatever the lists say."""
    # torch.compile takes seconds to load.
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()  # else the ninth length would run into the limit of recompilations
    compiled, mask = torch.compile(flex_attention, dynamic=False, fullgraph=True), selection.to_block_mask()
    mask.mask_mod = _causal  # cheaper, and enough where compiled code skips what is not listed
    # The GPU kernel's own tiles are of 128 queries, which a smaller block cannot hold.
    small = q.device.type == "cuda" and selection.block_size < 128
    options: Any = {"BLOCK_M": selection.block_size, "BLOCK_N": selection.block_size} if small else None
    queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))

    def attend() -> Tensor:
        out: Tensor = compiled(queries, keys, values, block_mask=mask, enable_gqa=True, kernel_options=options)
        return out.transpose(1, 2)

    return attend


def _causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key
