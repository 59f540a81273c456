"""The public calls: check the arguments, describe the call, run it."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, overload

import torch
from torch import Tensor

from stem_attention import checks, gradients, ops
from stem_attention.backends import Explanation, Request, backend_of, explain_request
from stem_attention.backends.dense import dense_attention
from stem_attention.call import Call
from stem_attention.errors import UnsupportedError, bad_argument
from stem_attention.policies import Policy, read_policy
from stem_attention.selection import BlockSelection, check_device


@overload
def stem_attention(
    q: Tensor, k: Tensor, v: Tensor, *, policy: Policy | str | None = ..., dense_below: int | None = ...,
    scale: float | None = ..., softcap: float | None = ..., prompt_len: int | None = ..., sinks: Tensor | None = ...,
    return_lse: Literal[False] = ..., backend: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def stem_attention(
    q: Tensor, k: Tensor, v: Tensor, *, policy: Policy | str | None = ..., dense_below: int | None = ...,
    scale: float | None = ..., softcap: float | None = ..., prompt_len: int | None = ..., sinks: Tensor | None = ...,
    return_lse: Literal[True], backend: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def stem_attention(
    q: Tensor, k: Tensor, v: Tensor, *, policy: Policy | str | None = None, dense_below: int | None = None,
    scale: float | None = None, softcap: float | None = None, prompt_len: int | None = None, sinks: Tensor | None = None,
    return_lse: bool = False, backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Compute causal attention that reads just the key blocks that a policy keeps.

    Prefill and training. Queries are the last ``q_len`` of the ``kv_len`` positions, as in FlashAttention. Only the last
    dimension must be contiguous; nothing is copied or padded.

    Gradients of q, k, v and sinks are exact for the blocks that were kept: ``dq = scale · Σ_kept dS K`` with ``dS = P ∘ (dP -
    Δ)``. The choice itself is piecewise constant and gets none. The same inputs give the same bits. Dense calls are
    differentiated by torch itself, but in compiled code, and with ``return_lse``, as sparse ones that keep everything.

    Args:
        q: ``(batch, q_len, q_heads, head_dim)``, bf16, fp16, fp32, or fp64 off the GPU.
        k: ``(batch, kv_len, kv_heads, head_dim)``, same dtype; query head ``h`` reads kv head ``h // (q_heads // kv_heads)``.
        v: The dtype of ``k``, and its shape but for the last dimension.
        policy: What to keep: a policy, or a spec such as ``"mass:share=8"`` or ``"paper"``, which torch.compile does not take;
            ``Mass()`` unless given.
        dense_below: Prompts of fewer tokens run dense; unless given, those below the length at which the backend that runs
            was measured to overtake dense attention (``explain().dense_below``).
        scale: Softmax scale; ``1 / sqrt(head_dim)`` unless given.
        softcap: Bound of the scaled scores ``s``, as in Gemma 2: they become ``softcap * tanh(s / softcap)``, also in the
            estimates of policies.
        prompt_len: Tokens of the whole prompt when prefill comes in chunks; ``kv_len`` unless given. Chunks that end on
            block borders then keep exactly the blocks that one call would keep.
        sinks: ``(q_heads,)``, fp32 or the dtype of ``q``, contiguous: a learnt logit of each head that takes part in the
            softmax of all its queries and has no value, as in gpt-oss. Policies do not look at it.
        return_lse: Also return the log-sum-exp.
        backend: ``"auto"`` picks the fastest that supports the call, see :func:`explain`; or a name.

    Returns:
        ``out`` like ``q``, its last dimension that of ``v``; with ``return_lse`` also the natural log-sum-exp of the scaled
        scores over the kept keys, and of the sink, fp32 ``(batch, q_heads, q_len)``.

    Raises:
        ValueError: An argument is wrong; the message names it, what was expected, what came and the way out.
        UnsupportedError: The backend cannot run this, or a derivative is asked for that there is none of: a second one, or one
            in forward mode.

    Warns:
        UserWarning: The shapes suggest ``(batch, heads, length, dim)``. Said once.
    """
    checks.check_qkv(q, k, v)
    checks.check_batch(q, k)
    checks.check_flag("return_lse", return_lse)
    length, scale = checks.check_prompt_len(prompt_len, k.shape[1]), checks.check_scale(scale, q.shape[3])
    known, limit, name = _policy(policy, q), checks.check_dense_below(dense_below), checks.check_backend(backend)
    sinks, softcap = checks.check_sinks(sinks, q), checks.check_softcap(softcap)
    if not torch.compiler.is_compiling():
        extra: dict[str, Any] = {"dense_below": limit, "return_lse": return_lse, "backend": name, "sinks": sinks}
        call = Call(q, k, v, known, scale, length, softcap=softcap, **extra)
        if not backend_of(call).runs_dense(call):
            limit = 0  # decided: the operator need not ask again
        elif call.plain and not return_lse:  # an operator would cost a short prompt more time than its attention
            return dense_attention(q, k, v, scale)
    run = gradients.attention if gradients.needed(q, k, v, sinks) else ops.attention
    out, lse = run(*ops.Arguments(q, k, v, sinks, ops.travel(known), scale, softcap, [length], name, limit, return_lse))
    return (out, lse) if return_lse else out


@overload
def stem_attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, *,
    page_table: Tensor | None = ..., prompt_lens: Sequence[int] | None = ..., policy: Policy | str | None = ...,
    dense_below: int | None = ..., scale: float | None = ..., softcap: float | None = ..., sinks: Tensor | None = ...,
    return_lse: Literal[False] = ..., backend: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def stem_attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, *,
    page_table: Tensor | None = ..., prompt_lens: Sequence[int] | None = ..., policy: Policy | str | None = ...,
    dense_below: int | None = ..., scale: float | None = ..., softcap: float | None = ..., sinks: Tensor | None = ...,
    return_lse: Literal[True], backend: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def stem_attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, *,
    page_table: Tensor | None = None, prompt_lens: Sequence[int] | None = None, policy: Policy | str | None = None,
    dense_below: int | None = None, scale: float | None = None, softcap: float | None = None, sinks: Tensor | None = None,
    return_lse: bool = False, backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Compute :func:`stem_attention` for a ragged batch; a sequence's result never depends on its neighbours.

    Reads the sequence borders on the host: pass them as CPU tensors to spare a GPU the synchronisation.

    Args:
        q: ``(total_q, q_heads, head_dim)``, sequences one after the other.
        k: ``(total_k, kv_heads, head_dim)``; with ``page_table`` the cache ``(pages, page_size, kv_heads, head_dim)``.
        v: The shape of ``k`` but for the last dimension.
        cu_seqlens_q: int32 ``(sequences + 1,)``, where each sequence's queries start; the last entry is ``total_q``.
        cu_seqlens_k: int32 ``(sequences + 1,)``, the same for keys; with ``page_table`` just their differences count.
        max_seqlen_q: Most queries of a sequence.
        max_seqlen_k: Most keys of a sequence.
        page_table: int32 ``(sequences, max_pages)``: the page of the cache that holds each run of ``page_size`` keys.
        prompt_lens: Whole prompt length of each sequence; its number of keys unless given.
        policy: As in :func:`stem_attention`.
        dense_below: As in :func:`stem_attention`, for each sequence by itself.
        scale: As in :func:`stem_attention`.
        softcap: As in :func:`stem_attention`.
        sinks: As in :func:`stem_attention`.
        return_lse: Also return the log-sum-exp.
        backend: As in :func:`stem_attention`.

    Returns:
        ``out`` like ``q``, its last dimension that of ``v``; with ``return_lse`` also fp32 ``(q_heads, total_q)``.

    Raises:
        ValueError: An argument is wrong; the message names it.
        UnsupportedError: The backend cannot run this, or a gradient is needed through a paged cache.
    """
    if page_table is None:
        checks.check_qkv(q, k, v, ("total", "heads", "dim"))
    else:
        checks.check_cache(q, k, v, page_table)
    starts = checks.read_borders("cu_seqlens_q", cu_seqlens_q, q.device, q.shape[0], "max_seqlen_q", max_seqlen_q)
    key_total = k.shape[0] if page_table is None else None
    key_starts = checks.read_borders("cu_seqlens_k", cu_seqlens_k, q.device, key_total, "max_seqlen_k", max_seqlen_k)
    checks.check_sequences(starts, key_starts, prompt_lens)
    if page_table is not None:
        checks.check_pages(page_table, key_starts, pages=k.shape[0], page_size=k.shape[1])
    checks.check_flag("return_lse", return_lse)
    lengths = [high - low for low, high in pairwise(key_starts)] if prompt_lens is None else list(prompt_lens)
    known, scale = _policy(policy, q), checks.check_scale(scale, q.shape[2])
    limit, name = checks.check_dense_below(dense_below), checks.check_backend(backend)
    sinks, softcap = checks.check_sinks(sinks, q), checks.check_softcap(softcap)
    run = gradients.attention if gradients.needed(q, k, v, sinks) else ops.attention
    if run is gradients.attention and page_table is not None:
        way = "pass packed keys and values, or call under torch.no_grad()"
        raise UnsupportedError(f"page_table: there is no gradient through a paged cache; {way}")
    where: dict[str, Any] = {"q_starts": starts, "k_starts": key_starts, "page_table": page_table}
    form = ops.travel(known), scale, softcap, lengths, name, limit, return_lse
    out, lse = run(*ops.Arguments(q, k, v, sinks, *form, **where))
    return (out, lse) if return_lse else out


def select_blocks(
    q: Tensor, k: Tensor, v: Tensor, *, policy: Policy | str | None = None, scale: float | None = None,
    softcap: float | None = None, prompt_len: int | None = None, backend: str = "auto",
) -> BlockSelection:  # fmt: skip
    """Choose the key blocks that a policy keeps, whatever the length. Arguments and errors as in :func:`stem_attention`."""
    checks.check_qkv(q, k, v)
    checks.check_batch(q, k)
    length, scale = checks.check_prompt_len(prompt_len, k.shape[1]), checks.check_scale(scale, q.shape[3])
    known, name = _policy(policy, q), checks.check_backend(backend)
    softcap = checks.check_softcap(softcap)
    indices, counts = ops.select(*ops.Arguments(q, k, v, None, ops.travel(known), scale, softcap, [length], name))
    return BlockSelection(indices, counts, known.block_size, q.shape[1], k.shape[1])


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, *, window: int | None = ..., scale: float | None = ...,
    softcap: float | None = ..., sinks: Tensor | None = ..., return_lse: Literal[False] = ..., backend: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, *, window: int | None = ..., scale: float | None = ...,
    softcap: float | None = ..., sinks: Tensor | None = ..., return_lse: Literal[True], backend: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, *, window: int | None = None, scale: float | None = None,
    softcap: float | None = None, sinks: Tensor | None = None, return_lse: bool = False, backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Compute exact causal attention over the blocks of ``selection``, whichever policy made it, with exact gradients for it.

    ``selection`` must have been made for these shapes. ``window`` counts the keys that a query sees at most, its own and those
    right before it, of the blocks that are kept: what transformers calls ``sliding_window``; None for all. It has no gradient.
    :meth:`BlockSelection.of_window` keeps just the blocks that a window touches. Other arguments, returns and errors are those
    of :func:`stem_attention`.
    """
    checks.check_qkv(q, k, v)
    checks.check_batch(q, k)
    checks.check_selection(selection, q, k)
    checks.check_flag("return_lse", return_lse)
    scale, name = checks.check_scale(scale, q.shape[3]), checks.check_backend(backend)
    sinks, softcap = checks.check_sinks(sinks, q), checks.check_softcap(softcap)
    window = checks.check_window(window, k.shape[1])
    run = gradients.attention if gradients.needed(q, k, v, sinks) else ops.attention
    if run is gradients.attention:
        gradients.check_window(window)
    lists = {"indices": selection.indices, "counts": selection.counts, "block_size": selection.block_size}
    given: dict[str, Any] = {"return_lse": return_lse, "window": window, **lists}
    out, lse = run(*ops.Arguments(q, k, v, sinks, None, scale, softcap, [k.shape[1]], name, **given))
    return (out, lse) if return_lse else out


def explain(
    *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, head_dim: int = 128,
    value_dim: int | None = None, policy: Policy | str | None = None, dense_below: int | None = None, backend: str = "auto",
) -> Explanation:  # fmt: skip
    """Say which backend would run a call and why, and which prompts run dense; ``print`` the answer.

    The call's tensors would lie on ``device`` and have this ``dtype`` and ``head_dim`` as their last dimension, values
    ``value_dim`` where that is another; the other arguments and the errors are those of :func:`stem_attention`.
    """
    if dtype not in checks.DTYPES:
        names = ", ".join(map(str, checks.DTYPES))
        raise bad_argument("dtype", f"one of {names}", repr(dtype), "ask for the dtype of q, k and v")
    for name, dim, of in (("head_dim", head_dim, "q and k"), ("value_dim", head_dim if value_dim is None else value_dim, "v")):
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise bad_argument(name, "an integer >= 1", repr(dim), f"ask for the last dimension of {of}")
    known, limit = read_policy(policy), checks.check_dense_below(dense_below)
    request = Request(check_device(device), dtype, head_dim, known.block_size, value_dim)
    return explain_request(request, checks.check_backend(backend), known, limit)


def _policy(policy: Policy | str | None, q: Tensor) -> Policy:
    """The policy of a call of one layer whose queries are ``(..., q_heads, head_dim)``."""
    known = read_policy(policy)
    known.check_heads(q.shape[-2])
    return known
