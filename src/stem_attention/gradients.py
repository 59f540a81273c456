"""Attention whose gradient is asked for, as torch operators and what autograd makes of them.

A selection is piecewise constant, so it gets no gradient: q, k and v do, over the blocks that were kept. With P the weights of
kept keys, O the output and L the log-sum-exp::

    Δ  = rowsum(dO ∘ O) - dL
    dS = P ∘ (dO Vᵀ - Δ)
    dQ = scale · dS K,   dK = scale · dSᵀ Q,   dV = Pᵀ dO

Between the passes lie q, k, v, O, L and a bit for each pair of blocks; P is worked out again, block by block.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from stem_attention import backends, ops
from stem_attention.backends.kept import WORD
from stem_attention.blocks import BlockGrid, block_count
from stem_attention.call import Call, PackedBatch
from stem_attention.errors import UnsupportedError
from stem_attention.policies.base import Policy
from stem_attention.selection import BlockSelection


def needed(*tensors: Tensor) -> bool:
    """Tell whether autograd would ask for the gradient of any of these tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def forward(
    q: Tensor, k: Tensor, v: Tensor, policy: Policy, scale: float, prompt_len: int, dense_below: int | None, backend: str
) -> tuple[Tensor, Tensor]:
    """Run as the operator of that name; the results have gradients."""
    rest = (ops.travel(policy), scale, prompt_len, dense_below, backend)
    return _attention(q, k, v, "forward_kept", rest, policy.block_size, scale, None, None, backend)


def forward_varlen(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Sequence[int], k_starts: Sequence[int], prompt_lens: Sequence[int],
    policy: Policy, scale: float, dense_below: int | None, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run as the operator of that name; the results have gradients."""
    rest = (q_starts, k_starts, prompt_lens, ops.travel(policy), scale, dense_below, backend)
    return _attention(q, k, v, "forward_varlen_kept", rest, policy.block_size, scale, q_starts, k_starts, backend)


def attend(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, block_size: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Run as the operator of that name; the results have gradients."""
    rest = (indices, counts, block_size, scale, backend)
    return _attention(q, k, v, "attend_kept", rest, block_size, scale, None, None, backend)


def _attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    try:
        out, lse, _ = _Attention.apply(q, k, v, *rest)  # type: ignore[no-untyped-call]
    except NotImplementedError as error:  # compiled code takes no functions that say so themselves
        if "jvp" not in str(error):
            raise
        raise UnsupportedError("Stem has no forward-mode derivative, of its gradient neither; leave the dual level") from error
    return out, lse


class _Attention(torch.autograd.Function):
    """An operator that runs attention and returns what it kept; and the operator of its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, operator: str, arguments: tuple[Any, ...], block_size: int, scale: float,
        q_starts: Sequence[int] | None, k_starts: Sequence[int] | None, backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        out, lse, kept = _OPERATORS[operator](q, k, v, *arguments)
        return out, lse, kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        q, k, v, _, _, *ctx.rest = inputs
        out, lse, kept = output
        ctx.mark_non_differentiable(kept)
        ctx.save_for_backward(q, k, v, out, lse, kept)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor, _: Any) -> Any:
        tensors = (d_out, d_lse, *ctx.saved_tensors)
        # Under create_graph=True the gradient may be differentiated again.
        run = _Gradient.apply if needed(*tensors) else _OPERATORS["backward"]
        return *run(*tensors, *ctx.rest), *[None] * 7


class _Gradient(torch.autograd.Function):
    """The operator of the gradient, which has none itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        d_q, d_k, d_v = _OPERATORS["backward"](*arguments)
        return d_q, d_k, d_v

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise UnsupportedError("Stem has no second derivative; differentiate once, or without create_graph=True")


def _forward_kept(
    q: Tensor, k: Tensor, v: Tensor, policy: str, scale: float, prompt_len: int, dense_below: int | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return backends.run_kept(Call(q, k, v, ops.arrived(policy), scale, prompt_len, None, dense_below, True, backend))


def _forward_varlen_kept(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Sequence[int], k_starts: Sequence[int], prompt_lens: Sequence[int], policy: str,
    scale: float, dense_below: int | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch = PackedBatch.of_starts(q_starts, k_starts, prompt_lens, None, q.device)
    return backends.run_kept(Call(q, k, v, ops.arrived(policy), scale, 0, batch, dense_below, True, backend))


def _attend_kept(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, block_size: int, scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    selection = BlockSelection(indices, counts, block_size, q.shape[1], k.shape[1])
    if q.device.type == "cpu":  # on a GPU this would wait for the device; kernels guard their own reads
        selection.validate()
    call = Call(q, k, v, ops.any_policy(block_size), scale, k.shape[1], return_lse=True, backend=backend)
    return backends.attend_kept(call, selection)


def _backward(
    d_out: Tensor, d_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kept: Tensor, block_size: int,
    scale: float, q_starts: Sequence[int] | None, k_starts: Sequence[int] | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch = None
    if q_starts is not None and k_starts is not None:
        prompt_lens = [high - low for low, high in pairwise(k_starts)]
        batch = PackedBatch.of_starts(q_starts, k_starts, prompt_lens, None, q.device)
    call = Call(q, k, v, ops.any_policy(block_size), scale, k.shape[1], batch, return_lse=True, backend=backend)
    return backends.backward(call, kept, (out, lse), (d_out, d_lse))


def _results(q: Tensor, batch: int, rows: int, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    heads = q.shape[-2]
    lse = q.new_empty((heads, q.shape[0]) if q.dim() == 3 else (q.shape[0], heads, q.shape[1]), dtype=torch.float32)
    kept = q.new_empty((batch, heads, rows, block_count(blocks, WORD)), dtype=torch.int32)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse, kept


def _fake_forward_kept(q: Tensor, k: Tensor, v: Tensor, policy: str, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    grid = BlockGrid.of(q, k, ops.arrived(policy).block_size)
    return _results(q, q.shape[0], grid.key_blocks - grid.first_row, grid.key_blocks)


def _fake_attend_kept(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, block_size: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grid = BlockGrid.of(q, k, block_size)
    return _results(q, q.shape[0], grid.key_blocks - grid.first_row, grid.key_blocks)


def _fake_forward_varlen_kept(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Sequence[int], k_starts: Sequence[int], prompt_lens: Sequence[int], policy: str,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    size = ops.arrived(policy).block_size
    most_q, most_k = (max(b - a for a, b in pairwise(starts)) for starts in (q_starts, k_starts))
    return _results(q, len(prompt_lens), block_count(most_q - 1, size) + 1 if most_q else 0, block_count(most_k, size))


def _fake_backward(d_out: Tensor, d_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return d_q, d_k, d_v


_FAKES: dict[Callable[..., Any], Callable[..., Any]] = {
    _forward_kept: _fake_forward_kept, _forward_varlen_kept: _fake_forward_varlen_kept, _attend_kept: _fake_attend_kept,
    _backward: _fake_backward,
}  # fmt: skip
_OPERATORS = {run.__name__[1:]: ops.define(run, fake) for run, fake in _FAKES.items()}
