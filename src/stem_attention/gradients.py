"""Attention whose gradient is asked for, as torch operators and what autograd makes of them.

A selection is piecewise constant, so it gets no gradient: q, k, v and sinks do, over the blocks that were kept. With P the
weights of kept keys, O the output, L the log-sum-exp and z the logit of a sink, of which P, O and L know::

    Δ  = rowsum(dO ∘ O) - dL
    dS = P ∘ (dO Vᵀ - Δ)
    dQ = scale · dS K,   dK = scale · dSᵀ Q,   dV = Pᵀ dO,   dz = -sum(exp(z - L) Δ)

Under a soft cap c a scaled score s became c · tanh(s / c), and dS is multiplied by 1 - tanh²(s / c) besides.
Between the passes lie q, k, v, O, L and a bit for each pair of blocks; P is worked out again, block by block.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from stem_attention import backends, ops
from stem_attention.backends.kept import WORD
from stem_attention.backends.torch.backward import row_sums
from stem_attention.blocks import BlockGrid, block_count, most_rows
from stem_attention.call import Call, PackedBatch
from stem_attention.errors import UnsupportedError
from stem_attention.policies.base import Policy


def needed(*tensors: Tensor | None) -> bool:
    """Tell whether autograd would ask for the gradient of any of these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def check_window(window: int | None) -> None:
    """Refuse a sliding window, which has no gradient here."""
    if window is not None:
        ways = "detach q, k, v and sinks, call under torch.no_grad(), or train with the model's own attention"
        raise UnsupportedError(f"Stem has no gradient of windows; {ways}")


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, policy: Policy, scale: float, softcap: float | None,
    prompt_len: int, dense_below: int | None, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run as the operator of that name; the results have gradients."""
    rest = (ops.travel(policy), scale, softcap, prompt_len, dense_below, backend)
    return _attention(q, k, v, sinks, "forward_kept", rest, policy.block_size, scale, softcap, None, None, backend)


def forward_varlen(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, q_starts: Sequence[int], k_starts: Sequence[int],
    prompt_lens: Sequence[int], policy: Policy, scale: float, softcap: float | None, dense_below: int | None, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run as the operator of that name; the results have gradients."""
    rest = (q_starts, k_starts, prompt_lens, ops.travel(policy), scale, softcap, dense_below, backend)
    size, starts = policy.block_size, (q_starts, k_starts)
    return _attention(q, k, v, sinks, "forward_varlen_kept", rest, size, scale, softcap, *starts, backend)


def attend(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, indices: Tensor, counts: Tensor, block_size: int, scale: float,
    softcap: float | None, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run as the operator of that name; the results have gradients."""
    rest = (indices, counts, block_size, scale, softcap, backend)
    return _attention(q, k, v, sinks, "attend_kept", rest, block_size, scale, softcap, None, None, backend)


def _attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    try:
        out, lse, _ = _Attention.apply(*arguments)  # type: ignore[no-untyped-call]
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
        q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, operator: str, arguments: tuple[Any, ...], block_size: int,
        scale: float, softcap: float | None, q_starts: Sequence[int] | None, k_starts: Sequence[int] | None, backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        out, lse, kept = _OPERATORS[operator](q, k, v, sinks, *arguments)
        return out, lse, kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        q, k, v, sinks, _, _, *ctx.rest = inputs
        out, lse, kept = output
        ctx.mark_non_differentiable(kept)
        ctx.save_for_backward(q, k, v, sinks, out, lse, kept)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor, _: Any) -> Any:
        saved = ctx.saved_tensors  # checkpointing lets them be asked for once
        # Under create_graph=True the gradient may be differentiated again.
        run = _Gradient.apply if needed(d_out, d_lse, *saved) else _OPERATORS["backward"]
        wanted = ctx.needs_input_grad[3]
        *d_qkv, d_sinks = run(d_out, d_lse, *saved, wanted, *ctx.rest)
        return *d_qkv, d_sinks if wanted else None, *[None] * 8


class _Gradient(torch.autograd.Function):
    """The operator of the gradient, which has none itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        d_q, d_k, d_v, d_sinks = _OPERATORS["backward"](*arguments)
        return d_q, d_k, d_v, d_sinks

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise UnsupportedError("Stem has no second derivative; differentiate once, or without create_graph=True")


def _forward_kept(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, policy: str, scale: float, softcap: float | None,
    prompt_len: int, dense_below: int | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    extra: dict[str, Any] = {"sinks": sinks, "softcap": softcap}
    return backends.run_kept(Call(q, k, v, ops.arrived(policy), scale, prompt_len, None, dense_below, True, backend, **extra))


def _forward_varlen_kept(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, q_starts: Sequence[int], k_starts: Sequence[int],
    prompt_lens: Sequence[int], policy: str, scale: float, softcap: float | None, dense_below: int | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch = PackedBatch.of_starts(q_starts, k_starts, prompt_lens, None, q.device)
    extra: dict[str, Any] = {"sinks": sinks, "softcap": softcap}
    return backends.run_kept(Call(q, k, v, ops.arrived(policy), scale, 0, batch, dense_below, True, backend, **extra))


def _attend_kept(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, indices: Tensor, counts: Tensor, block_size: int, scale: float,
    softcap: float | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    selection = ops.arrived_selection(q, k, indices, counts, block_size)
    extra: dict[str, Any] = {"sinks": sinks, "softcap": softcap, "return_lse": True, "backend": backend}
    call = Call(q, k, v, ops.any_policy(block_size), scale, k.shape[1], **extra)
    return backends.attend_kept(call, selection)


def _backward(
    d_out: Tensor, d_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, out: Tensor, lse: Tensor, kept: Tensor,
    of_sinks: bool, block_size: int, scale: float, softcap: float | None, q_starts: Sequence[int] | None,
    k_starts: Sequence[int] | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch = None
    if q_starts is not None and k_starts is not None:
        prompt_lens = [high - low for low, high in pairwise(k_starts)]
        batch = PackedBatch.of_starts(q_starts, k_starts, prompt_lens, None, q.device)
    extra: dict[str, Any] = {"sinks": sinks, "softcap": softcap, "return_lse": True, "backend": backend}
    call = Call(q, k, v, ops.any_policy(block_size), scale, k.shape[1], batch, **extra)
    d_q, d_k, d_v = backends.backward(call, kept, (out, lse), (d_out, d_lse))
    return d_q, d_k, d_v, _of_sinks(sinks if of_sinks else None, out, lse, d_out, d_lse)


def _of_sinks(sinks: Tensor | None, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor) -> Tensor:
    """Return the gradient of sinks, ``(q_heads,)``; nothing of it where it is not wanted."""
    if sinks is None:
        return out.new_empty(0)
    delta = row_sums(out, d_out, d_lse)
    weights = torch.exp(sinks.to(delta.dtype)[:, None] - lse)
    return -(weights * delta).sum(-1).view(-1, len(sinks)).sum(0).to(sinks.dtype)


def _results(q: Tensor, v: Tensor, batch: int, rows: int, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    heads = q.shape[-2]
    lse = q.new_empty((heads, q.shape[0]) if q.dim() == 3 else (q.shape[0], heads, q.shape[1]), dtype=torch.float32)
    kept = q.new_empty((batch, heads, rows, block_count(blocks, WORD)), dtype=torch.int32)
    return torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device), lse, kept


def _fake_forward_kept(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, policy: str, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grid = BlockGrid.of(q, k, ops.arrived(policy).block_size)
    return _results(q, v, q.shape[0], grid.key_blocks - grid.first_row, grid.key_blocks)


def _fake_attend_kept(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, indices: Tensor, counts: Tensor, block_size: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grid = BlockGrid.of(q, k, block_size)
    return _results(q, v, q.shape[0], grid.key_blocks - grid.first_row, grid.key_blocks)


def _fake_forward_varlen_kept(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, q_starts: Sequence[int], k_starts: Sequence[int],
    prompt_lens: Sequence[int], policy: str, *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    size = ops.arrived(policy).block_size
    most_q, most_k = (max(b - a for a, b in pairwise(starts)) for starts in (q_starts, k_starts))
    return _results(q, v, len(prompt_lens), most_rows(most_q, size), block_count(most_k, size))


def _fake_backward(
    d_out: Tensor, d_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, out: Tensor, lse: Tensor, kept: Tensor,
    of_sinks: bool, *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    given = q, k, v, q.new_empty(0) if sinks is None or not of_sinks else sinks
    d_q, d_k, d_v, d_sinks = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in given)
    return d_q, d_k, d_v, d_sinks


_FAKES: dict[Callable[..., Any], Callable[..., Any]] = {
    _forward_kept: _fake_forward_kept, _forward_varlen_kept: _fake_forward_varlen_kept, _attend_kept: _fake_attend_kept,
    _backward: _fake_backward,
}  # fmt: skip
_OPERATORS = {run.__name__[1:]: ops.define(run, fake) for run, fake in _FAKES.items()}
