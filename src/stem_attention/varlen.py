"""Ragged batches: sequences of different lengths packed along one dimension, keys optionally in a paged cache."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, overload

import torch
from torch import Tensor

from stem_attention.api import stem_attention
from stem_attention.checks import check_qkv
from stem_attention.config import StemConfig
from stem_attention.errors import bad_argument


@overload
def stem_attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, *,
    page_table: Tensor | None = ..., prompt_lens: Sequence[int] | None = ..., config: StemConfig | None = ...,
    scale: float | None = ..., return_lse: Literal[False] = ..., backend: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def stem_attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, *,
    page_table: Tensor | None = ..., prompt_lens: Sequence[int] | None = ..., config: StemConfig | None = ...,
    scale: float | None = ..., return_lse: Literal[True], backend: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def stem_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    page_table: Tensor | None = None,
    prompt_lens: Sequence[int] | None = None,
    config: StemConfig | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`stem_attention` for a ragged batch, one sequence at a time, so a row never depends on its neighbours.

    Reads the sequence borders on the host.

    Args:
        q: ``(total_q, q_heads, head_dim)``, sequences one after the other.
        k: ``(total_k, kv_heads, head_dim)``; with ``page_table`` the cache ``(pages, page_size, kv_heads, head_dim)``.
        v: The shape of ``k``.
        cu_seqlens_q: int32 ``(sequences + 1,)``, where each sequence's queries start; the last entry is ``total_q``.
        cu_seqlens_k: int32 ``(sequences + 1,)``, the same for keys; with ``page_table`` just their differences count.
        max_seqlen_q: Most queries of a sequence.
        max_seqlen_k: Most keys of a sequence.
        page_table: int32 ``(sequences, max_pages)``: the page of the cache that holds each run of ``page_size`` keys.
        prompt_lens: Whole prompt length of each sequence; its number of keys unless given.
        config, scale, return_lse, backend: As in :func:`stem_attention`.

    Returns:
        ``out`` like ``q``; with ``return_lse`` also fp32 ``(q_heads, total_q)``.

    Raises:
        ValueError: An argument is wrong; the message names it.
        UnsupportedError: The backend cannot run this, or a gradient is needed.
    """
    if page_table is None:
        check_qkv(q, k, v, ("total", "heads", "dim"))
    else:
        _check_pages(q, k, v, page_table)
    starts = _borders("cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q, "max_seqlen_q")
    key_total = k.shape[0] if page_table is None else None
    key_starts = _borders("cu_seqlens_k", cu_seqlens_k, key_total, max_seqlen_k, "max_seqlen_k")
    sequences = len(starts) - 1
    if len(key_starts) != len(starts):
        raise bad_argument("cu_seqlens_k", f"{len(starts)} entries, as in cu_seqlens_q", len(key_starts), "list every sequence")
    if prompt_lens is not None and len(prompt_lens) != sequences:
        raise bad_argument(
            "prompt_lens", f"one length for each of {sequences} sequences", len(prompt_lens), "list every sequence"
        )
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    for i in range(sequences):
        low, high = starts[i], starts[i + 1]
        keys, values = (_sequence(x, i, key_starts, page_table) for x in (k, v))
        if high == low:
            continue
        part, norm = stem_attention(
            q[None, low:high], keys[None], values[None], config=config, scale=scale,
            prompt_len=None if prompt_lens is None else int(prompt_lens[i]), return_lse=True, backend=backend,
        )  # fmt: skip
        out[low:high], lse[:, low:high] = part[0], norm[0]
    return (out, lse) if return_lse else out


def _borders(name: str, cu_seqlens: Tensor, total: int | None, longest: int, longest_name: str) -> list[int]:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or len(cu_seqlens) < 2:
        got = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}" if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise bad_argument(name, "an int32 tensor (sequences + 1,)", got, "pass cumulative lengths that start at 0")
    borders: list[int] = cu_seqlens.tolist()
    lengths = [after - before for before, after in pairwise(borders)]
    if borders[0] != 0 or min(lengths) < 0 or (total is not None and borders[-1] != total):
        end = "" if total is None else f" and end at {total}"
        raise bad_argument(name, f"cumulative lengths that start at 0, never fall{end}", borders, "use cumsum of the lengths")
    if max(lengths) > longest:
        raise bad_argument(longest_name, f"at least the longest sequence, {max(lengths)}", longest, f"take it from {name}")
    return borders


def _check_pages(q: Tensor, k: Tensor, v: Tensor, page_table: Tensor) -> None:
    if page_table.dim() != 2 or page_table.dtype != torch.int32:
        got = f"{page_table.dtype} {tuple(page_table.shape)}"
        raise bad_argument("page_table", "int32 (sequences, max_pages)", got, "convert it")
    for name, cache in (("k", k), ("v", v)):
        if cache.dim() != 4:
            axes = "(pages, page_size, kv_heads, head_dim)"
            raise bad_argument(name, f"a paged cache {axes}", f"shape {tuple(cache.shape)}", "drop page_table for packed keys")
    check_qkv(q, k[:, 0], v[:, 0], ("total", "heads", "dim"))


def _sequence(x: Tensor, i: int, starts: list[int], page_table: Tensor | None) -> Tensor:
    """Keys or values of one sequence, ``(length, kv_heads, head_dim)``."""
    if page_table is None:
        return x[starts[i] : starts[i + 1]]
    length, page_size = starts[i + 1] - starts[i], x.shape[1]
    pages = page_table[i, : -(-length // page_size)].long()
    if pages.numel() and not 0 <= int(pages.min()) <= int(pages.max()) < x.shape[0]:
        raise bad_argument("page_table", f"pages 0 to {x.shape[0] - 1} for sequence {i}", pages.tolist(), "correct the table")
    if len(pages) * page_size < length:
        raise bad_argument("page_table", f"{-(-length // page_size)} pages for sequence {i}", len(pages), "widen the table")
    return x[pages].flatten(0, 1)[:length]
