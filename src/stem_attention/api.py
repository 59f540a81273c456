"""The public calls: check the arguments, choose a backend, run."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from stem_attention import ops
from stem_attention.backends import Explanation, Request, explain_request, get_backend
from stem_attention.backends.dense import dense_attention
from stem_attention.checks import (
    DTYPES,
    check_backend,
    check_batch,
    check_config,
    check_flag,
    check_prompt_len,
    check_qkv,
    check_scale,
    check_selection,
)
from stem_attention.config import StemConfig
from stem_attention.errors import bad_argument
from stem_attention.selection import BlockSelection, check_device


@overload
def stem_attention(
    q: Tensor, k: Tensor, v: Tensor, *, config: StemConfig | None = ..., scale: float | None = ...,
    prompt_len: int | None = ..., return_lse: Literal[False] = ..., backend: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def stem_attention(
    q: Tensor, k: Tensor, v: Tensor, *, config: StemConfig | None = ..., scale: float | None = ...,
    prompt_len: int | None = ..., return_lse: Literal[True], backend: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def stem_attention(
    q: Tensor, k: Tensor, v: Tensor, *, config: StemConfig | None = ..., scale: float | None = ...,
    prompt_len: int | None = ..., return_lse: bool, backend: str = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def stem_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: StemConfig | None = None,
    scale: float | None = None,
    prompt_len: int | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention that reads just the key blocks that matter (Stem, arXiv 2603.06274).

    Prefill only. Queries are the last ``q_len`` of the ``kv_len`` positions, as in FlashAttention. Prompts of fewer than
    :func:`dense_limit` tokens run dense. Only the last dimension must be contiguous; nothing is copied or padded.

    Args:
        q: ``(batch, q_len, q_heads, head_dim)``, bf16, fp16, fp32, or fp64 off the GPU.
        k: ``(batch, kv_len, kv_heads, head_dim)``, same dtype; query head ``h`` reads kv head ``h // (q_heads // kv_heads)``.
        v: The shape and dtype of ``k``.
        config: What to keep; ``StemConfig()`` unless given.
        scale: Softmax scale; ``1 / sqrt(head_dim)`` unless given.
        prompt_len: Tokens of the whole prompt when prefill comes in chunks; ``kv_len`` unless given. Chunks that end on
            block borders then keep exactly the blocks that one call would keep.
        return_lse: Also return the log-sum-exp.
        backend: ``"auto"`` picks the fastest that supports the call, see :func:`explain`; or a name.

    Returns:
        ``out`` like ``q``; with ``return_lse`` also the natural log-sum-exp of the scaled scores over the kept keys, fp32
        ``(batch, q_heads, q_len)``.

    Raises:
        ValueError: An argument is wrong; the message names it, what was expected, what came and the way out.
        UnsupportedError: The backend cannot run this, or a gradient is needed.
    """
    check_qkv(q, k, v)
    check_batch(q, k)
    length = check_prompt_len(prompt_len, k.shape[1])
    settings, scale, name = check_config(config, q.shape[2]), check_scale(scale, q.shape[3]), check_backend(backend)
    check_flag("return_lse", return_lse)
    # The operator would come to the same decision, but costs a short prompt more time than its attention.
    if not return_lse and not torch.compiler.is_compiling() and length < _dense_limit(q, settings, name):
        return dense_attention(q, k, v, scale)
    out, lse = ops.forward(q, k, v, settings.to_json(), scale, length, return_lse, name)
    return (out, lse) if return_lse else out


def select_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: StemConfig | None = None,
    scale: float | None = None,
    prompt_len: int | None = None,
    backend: str = "auto",
) -> BlockSelection:
    """Choose the key blocks that Stem keeps, whatever the length. Arguments and errors as in :func:`stem_attention`."""
    check_qkv(q, k, v)
    check_batch(q, k)
    length = check_prompt_len(prompt_len, k.shape[1])
    settings, scale, name = check_config(config, q.shape[2]), check_scale(scale, q.shape[3]), check_backend(backend)
    indices, counts = ops.select(q, k, v, settings.to_json(), scale, length, name)
    return BlockSelection(indices, counts, settings.block_size, q.shape[1], k.shape[1])


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, *, scale: float | None = ...,
    return_lse: Literal[False] = ..., backend: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, *, scale: float | None = ...,
    return_lse: Literal[True], backend: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, *, scale: float | None = ...,
    return_lse: bool, backend: str = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact causal attention over the blocks of ``selection``, whichever policy made it.

    Args, returns and errors are those of :func:`stem_attention`; ``selection`` must have been made for these shapes.
    """
    check_qkv(q, k, v)
    check_batch(q, k)
    check_selection(selection, q, k)
    check_flag("return_lse", return_lse)
    scale, name = check_scale(scale, q.shape[3]), check_backend(backend)
    out, lse = ops.attend(q, k, v, selection.indices, selection.counts, selection.block_size, scale, return_lse, name)
    return (out, lse) if return_lse else out


def explain(
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dim: int = 128,
    config: StemConfig | None = None,
    backend: str = "auto",
) -> Explanation:
    """Say which backend would run a call and why; ``print`` the answer.

    Args:
        device: Where the tensors would lie.
        dtype: Their dtype.
        head_dim: Their last dimension.
        config: The config that would be used.
        backend: As in :func:`stem_attention`.

    Raises:
        ValueError: An argument is wrong; the message names it.
    """
    return explain_request(_request(device, dtype, head_dim, check_config(config)), check_backend(backend))


def dense_limit(
    *, device: torch.device | str, dtype: torch.dtype, head_dim: int, config: StemConfig | None = None, backend: str = "auto"
) -> int:
    """Prompts of fewer tokens run dense in :func:`stem_attention`. Arguments and errors as in :func:`explain`.

    It is ``config.dense_below``, or, where that is None, the length at which the backend overtakes dense attention.
    """
    settings = check_config(config)
    request = _request(device, dtype, head_dim, settings)
    return get_backend(request, check_backend(backend)).dense_limit(settings)


def _dense_limit(q: Tensor, config: StemConfig, backend: str) -> int:
    return get_backend(Request.of(q, config.block_size), backend).dense_limit(config)


def _request(device: torch.device | str, dtype: torch.dtype, head_dim: int, config: StemConfig) -> Request:
    if dtype not in DTYPES:
        raise bad_argument("dtype", f"one of {', '.join(map(str, DTYPES))}", repr(dtype), "ask for the dtype of q, k and v")
    if isinstance(head_dim, bool) or not isinstance(head_dim, int) or head_dim < 1:
        raise bad_argument("head_dim", "an integer >= 1", repr(head_dim), "ask for the last dimension of q, k and v")
    return Request(check_device(device), dtype, head_dim, config.block_size)
