"""Run a call: on the device of its tensors, in their precision, by the backend that serves it."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from stem_attention.backends.base import Backend, Request, Results, check_chosen
from stem_attention.backends.dense import without_autocast
from stem_attention.backends.kept import nothing_kept
from stem_attention.backends.reference.packing import packed as reference_packed
from stem_attention.backends.registry import get_backend
from stem_attention.call import Call
from stem_attention.selection import BlockSelection


def run(call: Call, selection: BlockSelection | None = None) -> tuple[Tensor, Tensor]:
    """Select and attend, or attend over given blocks. Hosts call this eagerly; the torch operators end here.

    Returns:
        ``out`` like ``call.q``, ``call.out`` where that is given, and ``lse``, fp32 ``(batch, q_heads, q_len)`` or packed
        ``(q_heads, total_q)``, empty unless wanted.
    """
    if call.q.numel() == 0:
        return call.empty_results()
    with _device_of(call.q), without_autocast(call.q.device):
        if selection is not None:
            return backend_of(call).attend(call, selection)
        if call.k_scale is not None:
            call = _dequantised(call)
        out, lse = backend_of(call).runner(call)(call)
        if call.out is not None and out is not call.out:  # not every way to compute it writes where it is told
            out = call.out.copy_(out)
        return out, lse


def select(call: Call) -> BlockSelection:
    """Choose the blocks of a call that is not packed, whatever its length."""
    with _device_of(call.q), without_autocast(call.q.device):
        return check_chosen(call, backend_of(call).select(call))


def run_kept(call: Call, selection: BlockSelection | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Run a call whose gradient will be asked for. Returns ``out`` and ``lse`` as :func:`run`, and what was kept, as bits."""
    if call.q.numel() == 0:
        return *replace(call, return_lse=True).empty_results(), nothing_kept(call)
    with _device_of(call.q), without_autocast(call.q.device):
        backend = backend_of(call)
        return backend.forward_kept(call) if selection is None else backend.attend_kept(call, selection)


def backward(call: Call, kept: Tensor, results: Results, d_results: Results) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v of a call that :func:`run_kept` ran; see the backend's."""
    if call.q.numel() == 0:
        d_q, d_k, d_v = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (call.q, call.k, call.v))
        return d_q, d_k, d_v
    with _device_of(call.q), without_autocast(call.q.device):
        return backend_of(call).backward(call, kept, results, d_results)


def backend_of(call: Call) -> Backend:
    """Return the backend that serves a call; UnsupportedError where none can, or the one asked for cannot."""
    q, dims = call.q, (call.q.shape[-1], call.v.shape[-1])
    return _serving(q.device, q.dtype, *dims, call.policy.block_size, call.backend)


@cache
def _serving(device: torch.device, dtype: torch.dtype, dim: int, value_dim: int, block_size: int, name: str) -> Backend:
    return get_backend(Request(device, dtype, dim, block_size, value_dim), name)


def _dequantised(call: Call) -> Call:
    """Return the call of an fp8 cache with keys and values in the precision of its queries."""
    if _converts_fp8(call.q.device):
        from stem_attention.backends.triton.packing import packed
        from stem_attention.backends.triton.program import Launches

        return call.with_packed(*packed(call, Launches()))
    batch, k_scale, v_scale = call.batch, call.k_scale, call.v_scale
    assert batch is not None
    assert k_scale is not None
    assert v_scale is not None
    k, v = (reference_packed(x, scale, batch, call.q.dtype) for x, scale in ((call.k, k_scale), (call.v, v_scale)))
    return call.with_packed(k, v)


@cache
def _converts_fp8(device: torch.device) -> bool:
    """Tell whether Triton compiles conversions from e4m3 for a device: for cards from Ada on."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def _device_of(x: Tensor) -> AbstractContextManager[object]:
    """Make the device of a tensor the current one; costs nothing where it is, as nearly always.

    Kernels start on the current device. They may even reach another one's memory from there, but unordered with its own work.
    """
    here = not x.is_cuda or x.device.index == torch.cuda.current_device()
    return nullcontext() if here else torch.cuda.device(x.device)
