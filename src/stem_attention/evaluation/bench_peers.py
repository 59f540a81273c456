"""What Stem is timed against: dense attention, and block-sparse attention over the same lists."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stem_attention.selection import BlockSelection

_T = TypeVar("_T")
Peer = Callable[[], Callable[[], _T]]
"""Prepares what needs no timing and returns the call to time. Raises :class:`LeftOutError` when there is none."""

FLEX = "FlexAttention"


class LeftOutError(Exception):
    """Why a peer is not timed, as a clause."""


def admit(
    peers: Mapping[str, Peer[_T]], problem: Callable[[_T], str | None]
) -> tuple[dict[str, Callable[[], _T]], dict[str, str]]:
    """Prepare and run every peer once.

    Args:
        peers: By name.
        problem: What is wrong with a peer's result, or None.

    Returns:
        Calls of the peers that ran and are right, and for each other one the reason why it is left out.
    """
    calls, left_out = {}, {}
    for name, peer in peers.items():
        call, reason = _admit_one(peer, problem)
        if call is None:
            left_out[name] = reason
        else:
            calls[name] = call
    return calls, left_out


def _admit_one(peer: Peer[_T], problem: Callable[[_T], str | None]) -> tuple[Callable[[], _T] | None, str]:
    try:
        call = peer()
        result = call()
    except LeftOutError as error:
        return None, str(error)
    except torch.OutOfMemoryError:
        return None, "out of memory"
    except (RuntimeError, ValueError, AssertionError) as error:  # what kernels raise that do not take a shape
        first_line = (str(error).strip().splitlines() or ["no message"])[0]
        return None, f"cannot run: {type(error).__name__}: {first_line}"
    wrong = problem(result)
    return (call, "") if wrong is None else (None, f"wrong: {wrong}")


def dense_peers(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Peer[Tensor]]:
    """Causal attention as torch runs it; on a GPU the fastest kernels that there are, by name."""
    if q.device.type != "cuda":
        return {"dense SDPA": lambda: partial(_sdpa, q, k, v)}
    return {
        "cuDNN SDPA": lambda: partial(_sdpa_by, SDPBackend.CUDNN_ATTENTION, q, k, v),
        "Flash SDPA": lambda: partial(_sdpa_by, SDPBackend.FLASH_ATTENTION, q, k, v),
        "FlashAttention-4": lambda: _flash_attention_4(q, k, v),
    }


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out: Tensor = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def _sdpa_by(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(kernel):
        return _sdpa(q, k, v)


def _flash_attention_4(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None:
        raise LeftOutError("not installed")
    try:
        flash_attn_func = importlib.import_module("flash_attn.cute").flash_attn_func
    except ImportError as error:
        raise LeftOutError(f"installed, but does not load: {error}") from error

    def attend() -> Tensor:
        result = flash_attn_func(q, k, v, causal=True)
        out: Tensor = result[0] if isinstance(result, tuple) else result  # some versions add the log-sum-exp
        return out

    return attend


def flex_peer(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection) -> Callable[[], Tensor]:
    """FlexAttention over the lists of ``selection``, compiled: eager FlexAttention runs dense whatever the lists say."""
    # torch.compile takes seconds to load.
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    torch.compiler.reset()  # else the ninth length would run into the limit of recompilations
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    pad = torch.nn.functional.pad
    diagonal = torch.arange(selection.rows, dtype=torch.int32, device=q.device) + selection.first_row
    diagonal = diagonal.expand(selection.counts.shape)
    mask = BlockMask.from_kv_blocks(
        kv_num_blocks=torch.ones_like(selection.counts),
        kv_indices=pad(diagonal[..., None], (0, selection.key_blocks - 1)),  # it takes lists of full width only
        full_kv_num_blocks=selection.counts - 1,  # lists ascend, so the diagonal is the last entry
        full_kv_indices=pad(selection.indices.clamp(min=0), (0, selection.key_blocks - selection.indices.shape[3])),
        BLOCK_SIZE=selection.block_size,
        mask_mod=_causal,
        seq_lengths=(selection.q_len, selection.kv_len),
        compute_q_blocks=False,  # for the backward pass only
    )
    queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))

    def attend() -> Tensor:
        out: Tensor = compiled(queries, keys, values, block_mask=mask, enable_gqa=True)
        return out.transpose(1, 2)

    return attend


def _causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key
