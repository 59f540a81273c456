"""Attention whose gradient is asked for, as torch operators and what autograd makes of them.

A selection is piecewise constant, so it gets no gradient: q, k, v and sinks do, over the blocks that were kept. With P the
weights of kept keys, O the output, L the log-sum-exp and z the logit of a sink, of which P, O and L know::

    Δ  = rowsum(dO ∘ O) - dL
    dS = P ∘ (dO Vᵀ - Δ)
    dQ = scale · dS K,   dK = scale · dSᵀ Q,   dV = Pᵀ dO,   dz = -sum(exp(z - L) Δ)

Under a soft cap c a scaled score s became c · tanh(s / c), and dS is multiplied by 1 - tanh²(s / c) besides.
Between the passes lie q, k, v, O, L and a bit for each pair of blocks; P is worked out again, block by block.
"""

from typing import Any

import torch
from torch import Tensor

from stem_attention import backends, ops
from stem_attention.backends.kept import kept_shape
from stem_attention.backends.torch.backward import row_sums
from stem_attention.errors import UnsupportedError


def needed(*tensors: Tensor | None) -> bool:
    """Tell whether autograd would ask for the gradient of any of these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def check_window(window: int | None) -> None:
    """Refuse a sliding window, which has no gradient here."""
    if window is not None:
        ways = "detach q, k, v and sinks, call under torch.no_grad(), or train with the model's own attention"
        raise UnsupportedError(f"Stem has no gradient of windows; {ways}")


def attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Run as the operator of that name, with the log-sum-exp; the results have gradients."""
    try:
        out, lse, _ = _Attention.apply(*arguments)  # type: ignore[no-untyped-call]
    except NotImplementedError as error:  # compiled code takes no functions that say so themselves
        if "jvp" not in str(error):
            raise
        raise UnsupportedError("Stem has no forward-mode derivative, of its gradient neither; leave the dual level") from error
    return out, lse


# A backward pass needs no page table and no lists: the bits tell what was kept.
_BACKWARD = ops.Arguments._fields.index("page_table")
_WITHOUT = [None] * (len(ops.Arguments._fields) - 4)  # of all but q, k, v and sinks


class _Attention(torch.autograd.Function):
    """An operator that runs attention and returns what it kept; and the operator of its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        out, lse, kept = _attention_kept_operator(*arguments)
        return out, lse, kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        out, lse, kept = output
        ctx.mark_non_differentiable(kept)
        ctx.save_for_backward(*inputs[:4], out, lse, kept)
        ctx.rest = inputs[4:_BACKWARD]

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor, _: Any) -> Any:
        q, k, v, sinks, *results = saved = ctx.saved_tensors  # checkpointing lets them be asked for once
        # Under create_graph=True the gradient may be differentiated again.
        run = _Gradient.apply if needed(d_out, d_lse, *saved) else _backward_operator
        wanted = ctx.needs_input_grad[3]
        *d_qkv, d_sinks = run(d_out, d_lse, *results, wanted, q, k, v, sinks, *ctx.rest)
        return *d_qkv, d_sinks if wanted else None, *_WITHOUT


class _Gradient(torch.autograd.Function):
    """The operator of the gradient, which has none itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        d_q, d_k, d_v, d_sinks = _backward_operator(*arguments)
        return d_q, d_k, d_v, d_sinks

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise UnsupportedError("Stem has no second derivative; differentiate once, or without create_graph=True")


def _attention_kept(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    arguments = ops.Arguments(*given)
    return backends.run_kept(arguments.call(), arguments.selection())


def _backward(
    d_out: Tensor, d_lse: Tensor, out: Tensor, lse: Tensor, kept: Tensor, of_sinks: bool, *given: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = ops.Arguments(*given).call()
    d_q, d_k, d_v = backends.backward(call, kept, (out, lse), (d_out, d_lse))
    return d_q, d_k, d_v, _of_sinks(call.sinks if of_sinks else None, out, lse, d_out, d_lse)


def _of_sinks(sinks: Tensor | None, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor) -> Tensor:
    """Return the gradient of sinks, ``(q_heads,)``; nothing of it where it is not wanted."""
    if sinks is None:
        return out.new_empty(0)
    delta = row_sums(out, d_out, d_lse)
    weights = torch.exp(sinks.to(delta.dtype)[:, None] - lse)
    return -(weights * delta).sum(-1).view(-1, len(sinks)).sum(0).to(sinks.dtype)


def _fake_attention_kept(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    arguments = ops.Arguments(*given)
    starts = arguments.q_starts, arguments.k_starts
    shape = kept_shape(arguments.q, arguments.k, arguments.known.block_size, *starts)
    kept = arguments.q.new_empty(shape, dtype=torch.int32)
    return *ops.fake_attention(*arguments._replace(return_lse=True)), kept


def _fake_backward(
    d_out: Tensor, d_lse: Tensor, out: Tensor, lse: Tensor, kept: Tensor, of_sinks: bool, *given: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, sinks, *_ = given
    like = q, k, v, sinks if of_sinks else q.new_empty(0)
    d_q, d_k, d_v, d_sinks = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in like)
    return d_q, d_k, d_v, d_sinks


_RESULTS = "Tensor d_out, Tensor d_lse, Tensor out, Tensor lse, Tensor kept, bool of_sinks, "
_attention_kept_operator = ops.define(_attention_kept, _fake_attention_kept, results=3)
_backward_operator = ops.define(_backward, _fake_backward, results=4, before=_RESULTS)
