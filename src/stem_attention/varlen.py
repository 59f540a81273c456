"""Ragged batches: sequences of different lengths packed along one dimension, keys optionally in a paged cache."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, overload

import torch
from torch import Tensor

from stem_attention import ops
from stem_attention.checks import check_backend, check_config, check_flag, check_qkv, check_scale
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
@overload
def stem_attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, *,
    page_table: Tensor | None = ..., prompt_lens: Sequence[int] | None = ..., config: StemConfig | None = ...,
    scale: float | None = ..., return_lse: bool, backend: str = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
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
    """:func:`stem_attention` for a ragged batch; a sequence's result never depends on its neighbours.

    Reads the sequence borders on the host: pass them as CPU tensors to spare a GPU the synchronisation.

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
        config: As in :func:`stem_attention`.
        scale: As in :func:`stem_attention`.
        return_lse: Also return the log-sum-exp.
        backend: As in :func:`stem_attention`.

    Returns:
        ``out`` like ``q``; with ``return_lse`` also fp32 ``(q_heads, total_q)``.

    Raises:
        ValueError: An argument is wrong; the message names it.
        UnsupportedError: The backend cannot run this, or a gradient is needed.
    """
    if page_table is None:
        check_qkv(q, k, v, ("total", "heads", "dim"))
    else:
        _check_cache(q, k, v, page_table)
    starts = _borders("cu_seqlens_q", cu_seqlens_q, q.device, q.shape[0], "max_seqlen_q", max_seqlen_q)
    key_total = k.shape[0] if page_table is None else None
    key_starts = _borders("cu_seqlens_k", cu_seqlens_k, q.device, key_total, "max_seqlen_k", max_seqlen_k)
    _check_sequences(starts, key_starts, prompt_lens)
    if page_table is not None:
        _check_pages(page_table, key_starts, pages=k.shape[0], page_size=k.shape[1])
    lengths = [high - low for low, high in pairwise(key_starts)] if prompt_lens is None else list(prompt_lens)
    settings, scale = check_config(config, q.shape[1]), check_scale(scale, q.shape[2])
    check_flag("return_lse", return_lse)
    out, lse = ops.forward_varlen(
        q, k, v, starts, key_starts, page_table, settings.to_json(), scale, lengths, return_lse, check_backend(backend)
    )
    return (out, lse) if return_lse else out


def _borders(
    name: str, cu_seqlens: Tensor, device: torch.device, total: int | None, longest_name: str, longest: int
) -> list[int]:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or len(cu_seqlens) < 2:
        got = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}" if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise bad_argument(name, "an int32 tensor (sequences + 1,)", got, "pass cumulative lengths that start at 0")
    if cu_seqlens.device.type != "cpu" and cu_seqlens.device != device:
        raise bad_argument(name, f"the device of q, {device}, or the CPU", cu_seqlens.device, "move it with .to()")
    borders: list[int] = cu_seqlens.tolist()
    lengths = [after - before for before, after in pairwise(borders)]
    if borders[0] != 0 or min(lengths) < 0 or (total is not None and borders[-1] != total):
        end = "" if total is None else f" and end at {total}"
        raise bad_argument(name, f"cumulative lengths that start at 0, never fall{end}", borders, "use cumsum of the lengths")
    if not _is_int(longest) or max(lengths) > longest:
        expected = f"an integer >= the longest sequence, {max(lengths)}"
        raise bad_argument(longest_name, expected, repr(longest), f"take it from {name}")
    return borders


def _check_sequences(starts: list[int], key_starts: list[int], prompt_lens: Sequence[int] | None) -> None:
    sequences = len(starts) - 1
    if len(key_starts) != len(starts):
        raise bad_argument("cu_seqlens_k", f"{len(starts)} entries, as in cu_seqlens_q", len(key_starts), "list every sequence")
    if prompt_lens is not None and (not isinstance(prompt_lens, (list, tuple)) or len(prompt_lens) != sequences):
        got = f"{len(prompt_lens)} of them" if isinstance(prompt_lens, (list, tuple)) else type(prompt_lens).__name__
        expected = f"a list of one length for each of the {sequences} sequences"
        raise bad_argument("prompt_lens", expected, got, "list every sequence; .tolist() turns a tensor into a list")
    for i in range(sequences):
        queries, keys = starts[i + 1] - starts[i], key_starts[i + 1] - key_starts[i]
        if keys < queries:
            fix = "queries are the last positions of the keys; pass the cached keys too"
            raise bad_argument("cu_seqlens_k", f"at least the {queries} positions of q in sequence {i}", keys, fix)
        if prompt_lens is not None and (not _is_int(prompt_lens[i]) or prompt_lens[i] < keys):
            fix = "it counts every token of the prompt, also those still to come"
            raise bad_argument("prompt_lens", f"an integer >= the {keys} keys of sequence {i}", repr(prompt_lens[i]), fix)


def _check_cache(q: Tensor, k: Tensor, v: Tensor, page_table: Tensor) -> None:
    if not isinstance(page_table, Tensor) or page_table.dim() != 2 or page_table.dtype != torch.int32:
        got = f"{page_table.dtype} {tuple(page_table.shape)}" if isinstance(page_table, Tensor) else type(page_table).__name__
        raise bad_argument("page_table", "an int32 tensor (sequences, max_pages)", got, "convert it")
    for name, cache in (("k", k), ("v", v)):
        axes = "(pages, page_size >= 1, kv_heads, head_dim)"
        if not isinstance(cache, Tensor) or cache.dim() != 4 or cache.shape[1] == 0:
            got = f"shape {tuple(cache.shape)}" if isinstance(cache, Tensor) else type(cache).__name__
            raise bad_argument(name, f"a paged cache {axes}", got, "drop page_table for packed keys")
    if v.shape != k.shape:
        raise bad_argument("v", f"the shape of k, {tuple(k.shape)}", tuple(v.shape), "give one value for every key")
    check_qkv(q, k[:, 0], v[:, 0], ("total", "heads", "dim"))
    if page_table.device != q.device:
        raise bad_argument("page_table", f"the device of q, {q.device}", page_table.device, "move it with .to()")


def _check_pages(page_table: Tensor, key_starts: list[int], pages: int, page_size: int) -> None:
    sequences, width = page_table.shape
    if sequences != len(key_starts) - 1:
        raise bad_argument("page_table", f"{len(key_starts) - 1} rows, one a sequence", sequences, "list every sequence")
    for i, (low, high) in enumerate(pairwise(key_starts)):
        needed = -(-(high - low) // page_size)
        if width < needed:
            raise bad_argument("page_table", f"{needed} pages for sequence {i}", width, "widen the table")
        used = page_table[i, :needed]
        # On a GPU reading the table would wait for the device; kernels guard their own reads.
        if needed and page_table.device.type == "cpu" and not 0 <= int(used.min()) <= int(used.max()) < pages:
            raise bad_argument("page_table", f"pages 0 to {pages - 1} for sequence {i}", used.tolist(), "correct the table")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
