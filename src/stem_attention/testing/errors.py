"""How wrong a result is: against fp64, and beside what torch's own attention loses on the same problem."""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stem_attention.selection import BlockSelection
from stem_attention.testing.inputs import token_mask

# All but cuDNN, which keeps a plan for every shape it meets: hundreds of megabytes of a long soak's memory.
_JUDGES = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

# The error budget. Rows whose values nearly cancel make the worst row a matter of chance: among 3330 problems two came to
# 3.0 and 3.1 times torch's error. A row of one or two keys, where torch's error is 0, may be off by the last bit.
_TIMES_SDPA = 4.0
_LAST_BITS = 2.0
_FP64 = 1e-11
_LSE = 2e-5


def relative_error(out: Tensor, ref: Tensor) -> float:
    """Return ``|out - ref| / |ref|``, 2-norms of the whole tensors in fp64: 0 when both are empty or zero; NaN stays NaN."""
    return worst_row_error(out.flatten(), ref.flatten())


def worst_row_error(out: Tensor, ref: Tensor) -> float:
    """Return the largest relative error of a row along the last dimension, so that large rows cannot hide small ones."""
    if ref.numel() == 0:
        return 0.0
    difference = torch.linalg.vector_norm(out.double() - ref.double(), dim=-1)
    length = torch.linalg.vector_norm(ref.double(), dim=-1)
    return torch.where(difference == 0, 0.0, difference / length).max().item()


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float | None = None,
    *,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute masked attention in fp64, with nothing clever. Needs ``q_len * kv_len`` numbers per head.

    Args:
        q: ``(batch, q_len, q_heads, dim)``.
        k: ``(batch, kv_len, kv_heads, dim)``; query head ``h`` reads kv head ``h // (q_heads // kv_heads)``.
        v: The shape of ``k`` but for the last dimension.
        mask: Bool, broadcasts to ``(batch, q_heads, q_len, kv_len)``; see :func:`stem_attention.testing.token_mask`.
        scale: Softmax scale, ``1 / sqrt(dim)`` unless given.
        sinks: ``(q_heads,)``, a score of each head without a key and a value; or None.
        softcap: Bound of the scaled scores ``s``, which become ``softcap * tanh(s / softcap)``; or None.

    Returns:
        ``out (batch, q_len, q_heads, value_dim)`` and the natural log-sum-exp ``(batch, q_heads, q_len)``, both fp64.
    """
    (batch, q_len, heads, dim), kv_heads = q.shape, k.shape[2]
    # The queries of a group side by side: keys and values need not be repeated.
    queries = q.double().transpose(1, 2).reshape(batch, kv_heads, -1, dim)
    keys, values = (x.double().transpose(1, 2) for x in (k, v))
    scores = (queries @ keys.mT).view(batch, heads, q_len, -1) * (dim**-0.5 if scale is None else scale)
    weights, lse = _weights(scores, mask, sinks, softcap)
    out = (weights.view(batch, kv_heads, -1, k.shape[1]) @ values).view(batch, heads, q_len, -1)
    return out.transpose(1, 2), lse


def _weights(scores: Tensor, mask: Tensor, sinks: Tensor | None, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Return the weights of the keys and the log-sum-exp, in the dtype of the scores ``(batch, heads, q_len, kv_len)``."""
    if softcap is not None:  # tanh by exponentials, as kernels compute it: in fp32 the judge loses what they lose
        scores = softcap * (1 - 2 / ((2 / softcap * scores).exp() + 1))
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)], 3)
    return scores.softmax(-1)[..., : mask.shape[-1]], scores.logsumexp(-1)


def _eager_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None, sinks: Tensor | None, softcap: float | None
) -> Tensor:
    """Compute as models do on their own: scores and softmax in fp32, weights and values in the dtype of ``q``."""
    group = q.shape[2] // k.shape[2]
    queries, keys, values = q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))
    scores = queries.float() @ keys.float().mT * (q.shape[3] ** -0.5 if scale is None else scale)
    weights, _ = _weights(scores, mask, sinks, softcap)
    return (weights.to(q.dtype) @ values).transpose(1, 2)


def error_against_sdpa(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None, *, sinks: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[float, float]:  # fmt: skip
    """Return the worst row errors against fp64 of ``out`` and of torch's ``scaled_dot_product_attention``.

    Arguments as in :func:`exact_attention`. FlashAttention's own bound is twice the second. That function knows no sinks and
    no soft cap: with those, the second is the error of a model's own attention, softmax in fp32 and weights in the dtype of
    ``q``.
    """
    exact, _ = exact_attention(q, k, v, mask, scale, sinks=sinks, softcap=softcap)
    if sinks is not None or softcap is not None:
        eager = _eager_attention(q, k, v, mask, scale, sinks, softcap)
        return worst_row_error(out, exact), worst_row_error(eager, exact)
    group = q.shape[2] // k.shape[2]
    keys, values = (x.transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))
    queries = q.transpose(1, 2).contiguous()  # not every kernel of torch takes every stride
    with sdpa_kernel(_JUDGES):
        sdpa = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    return worst_row_error(out, exact), worst_row_error(sdpa.transpose(1, 2), exact)


def assert_accurate(
    out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float | None = None,
    *, sinks: Tensor | None = None, softcap: float | None = None, window: int | None = None,
) -> None:  # fmt: skip
    """Assert that a result is attention over a selection, about as exact as torch's own attention.

    ``out`` and ``lse`` (or None) are what a backend returned, in the shapes of :func:`exact_attention`, whose arguments the
    others are; ``window`` is that of :func:`block_sparse_attention`. The error of the worst row, against fp64, may be four
    times that of torch's attention in the same precision, and two units in the last place more; of fp64 inputs it may be 1e-11.
    The log-sum-exp is right to 2e-5 of ``1 + |lse|``. An AssertionError says what is off, and by how much.
    """
    assert (out.shape, out.dtype) == ((*q.shape[:3], v.shape[3]), q.dtype), f"out is {out.dtype} {tuple(out.shape)}"
    assert out.isfinite().all(), f"{int((~out.isfinite()).sum())} of {out.numel()} numbers of out are not finite"
    mask = token_mask(selection, window)
    exact, exact_lse = exact_attention(q, k, v, mask, scale, sinks=sinks, softcap=softcap)
    if q.dtype == torch.float64:
        ours, bound = worst_row_error(out, exact), _FP64
    else:
        ours, theirs = error_against_sdpa(out, q, k, v, mask, scale, sinks=sinks, softcap=softcap)
        bound = _TIMES_SDPA * theirs + _LAST_BITS * torch.finfo(q.dtype).eps
    assert ours <= bound, f"the worst row is off by {ours:.2e}, more than {bound:.2e}"
    if lse is not None:
        assert lse.shape == exact_lse.shape, f"lse is {tuple(lse.shape)}"
        off = (lse.double() - exact_lse).abs() / (1 + exact_lse.abs())
        assert (off <= _LSE).all(), f"lse is off by {off.max().item():.2e} of 1 + |lse|, more than {_LSE:.0e}"
