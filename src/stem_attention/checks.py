"""Checks of arguments, shared by every public entry: each raises a ValueError that names the argument and the way out."""

import sys
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from stem_attention.blocks import block_count
from stem_attention.errors import UnsupportedError, bad_argument, describe, is_size
from stem_attention.selection import BlockSelection

_unpack_dual: Callable[[Tensor], tuple[Tensor, Tensor | None]] = unpack_dual
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# More than any model known has: 128 in DeepSeek-V3, 232 in Falcon 180B.
_MANY_HEADS = 256
_COUNTS = "it counts every token of the prompt, also those still to come"
_told_of_layout: list[tuple[int, ...]] = []

_LONGEST = 2**31  # a bound of prompts: blocks of longer ones would fill the host's memory
_HIGHEST_CAP = 200  # models have 30 and 50; the error of a capped score grows with the cap


def check_qkv(q: Tensor, k: Tensor, v: Tensor, layout: tuple[str, ...] = ("batch", "length", "heads", "dim")) -> None:
    """Check rank, dtype, device, heads and dimensions of q, k and v; UnsupportedError for dual numbers of forward mode."""
    axes = ", ".join(layout)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dim() != len(layout):
            raise bad_argument(name, f"a tensor ({axes})", describe(x), "pass a torch.Tensor, or reshape or transpose it")
        if x.dtype not in DTYPES or x.dtype != q.dtype:
            expected = "bfloat16, float16, float32 or float64" if name == "q" else f"the dtype of q, {q.dtype}"
            raise bad_argument(name, expected, x.dtype, "convert it with .to()")
        if x.device != q.device:
            raise bad_argument(name, f"the device of q, {q.device}", x.device, "move it with .to()")
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise bad_argument(name, "a contiguous last dimension", f"strides {x.stride()}", "call .contiguous()")
        if x.shape[-1] == 0 or (x is not v and x.shape[-1] != q.shape[-1]):
            expected = "a head dimension above 0" if x is v else f"the head dimension of q, {q.shape[-1]}, and not 0"
            raise bad_argument(name, expected, x.shape[-1], "match the last dimensions of q and k")
    _check_values(k, v)
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        fix = "query head h reads kv head h // (q_heads // kv_heads); transpose tensors whose heads come before the length"
        raise bad_argument("k", f"a number of kv heads that divides the {heads} query heads", kv_heads, fix)
    _check_no_tangents(q, k, v)


def _check_no_tangents(*tensors: Tensor) -> None:
    """Refuse forward mode: operators drop tangents without a word, and it asks no tensor whether it requires a gradient."""
    if not torch.compiler.is_compiling() and any(_unpack_dual(x)[1] is not None for x in tensors):
        raise UnsupportedError("Stem has no forward-mode derivative; detach q, k, v and sinks, or leave the dual level")


def check_batch(q: Tensor, k: Tensor) -> None:
    """Check batch and lengths of ``(batch, length, heads, dim)`` tensors, and warn once of the layout of other libraries.

    ``(batch, heads, length, dim)`` passes where q and k have one shape. More than 256 heads, and more than four for each token,
    suggest it. A transposed prompt of fewer tokens looks like a short prompt of many heads and goes unnoticed.
    """
    if q.shape[0] == 0 or q.shape[0] != k.shape[0]:
        got = f"{q.shape[0]} in q and {k.shape[0]} in k"
        raise bad_argument("q", "the same batch size in q and k, at least 1", got, "skip the call for an empty batch")
    if k.shape[1] < q.shape[1]:
        fix = "pass the cached keys too: queries are the last positions; transpose tensors whose heads come before the length"
        raise bad_argument("k", f"at least the {q.shape[1]} positions of q", k.shape[1], fix)
    # Compiled code neither warns nor is compiled anew for such a comparison.
    if torch.compiler.is_compiling() or _told_of_layout or q.shape != k.shape or q.shape[2] <= _MANY_HEADS:
        return
    if 0 < 4 * q.shape[1] < q.shape[2]:
        got = f"got {_shape(q)}, that is {q.shape[2]} heads for {q.shape[1]} tokens"
        fix = "call .transpose(1, 2) if they are (batch, heads, length, dim)"
        warnings.warn(f"q and k: expected (batch, length, heads, dim), {got}; {fix}", stacklevel=3)  # of the call's caller
        _told_of_layout.append(_shape(q))


def check_scale(scale: float | None, head_dim: int) -> float:
    """Return the softmax scale, ``1 / sqrt(head_dim)`` unless given."""
    if scale is None:
        return float(head_dim**-0.5)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not abs(scale) <= sys.float_info.max:
        raise bad_argument("scale", "a finite number or None", repr(scale), "leave it out for 1 / sqrt(head_dim)")
    return float(scale)


def check_softcap(softcap: float | None) -> float | None:
    """Return the bound of the scores; None for none."""
    if softcap is None:
        return None
    if isinstance(softcap, bool) or not isinstance(softcap, (int, float)) or not 0 < softcap <= _HIGHEST_CAP:
        expected = f"None or a number above 0 and at most {_HIGHEST_CAP}, as far as the kernels' tanh is exact enough"
        raise bad_argument("softcap", expected, repr(softcap), "leave it out for scores without a cap")
    return float(softcap)


def check_window(window: int | None, kv_len: int) -> int | None:
    """Return how many of ``kv_len`` keys a query sees; None for all, and for a window that hides none."""
    if window is None:
        return None
    if not is_size(window) or window < 1:
        fix = "count the query's own key; leave it out for none"
        raise bad_argument("window", "an integer >= 1 or None", repr(window), fix)
    return window if window < kv_len else None


def check_sinks(sinks: Tensor | None, q: Tensor) -> Tensor | None:
    """Check the sinks of a call whose queries are ``(..., q_heads, head_dim)``; an UnsupportedError in forward mode."""
    if sinks is None:
        return None
    heads = q.shape[-2]
    if not isinstance(sinks, Tensor) or sinks.dim() != 1 or sinks.shape[0] != heads:
        expected = f"None or a tensor ({heads},), a logit for each query head"
        raise bad_argument("sinks", expected, describe(sinks), "pass those of the layer; a rank passes those of its heads")
    if sinks.dtype not in (torch.float32, q.dtype):
        raise bad_argument("sinks", f"float32 or the dtype of q, {q.dtype}", sinks.dtype, "convert it with .float()")
    if sinks.device != q.device:
        raise bad_argument("sinks", f"the device of q, {q.device}", sinks.device, "move it with .to()")
    if heads > 1 and sinks.stride(0) != 1:
        raise bad_argument("sinks", "a contiguous tensor", f"strides {sinks.stride()}", "call .contiguous()")
    _check_no_tangents(sinks)
    return sinks


def check_backend(backend: str) -> str:
    """Return the name of a backend; the registry says whether there is one of that name."""
    if not isinstance(backend, str):
        raise bad_argument("backend", "the name of a backend", repr(backend), 'use "auto" unless you compare')
    return backend


def check_flag(name: str, value: bool) -> None:
    """Check that an argument is ``True`` or ``False``."""
    if not isinstance(value, bool):
        raise bad_argument(name, "True or False", repr(value), "pass one of the two")


def check_dense_below(dense_below: int | None) -> int | None:
    """Return the prompt length under which a call runs dense; None leaves it to the backend."""
    if dense_below is None:
        return None
    if not is_size(dense_below) or dense_below < 0:
        fix = "0 is always sparse; leave it out for the backend's own"
        raise bad_argument("dense_below", "an integer >= 0 or None", repr(dense_below), fix)
    return min(dense_below, _LONGEST)  # operators take 64 bits


def check_prompt_len(prompt_len: int | None, kv_len: int) -> int:
    """Return the length of the whole prompt, ``kv_len`` unless given."""
    if prompt_len is None:
        return kv_len
    if not is_size(prompt_len) or prompt_len < kv_len or prompt_len >= _LONGEST:
        raise bad_argument("prompt_len", f"an integer >= the {kv_len} keys given and < 2^31", repr(prompt_len), _COUNTS)
    return prompt_len


def check_selection(selection: BlockSelection, q: Tensor, k: Tensor) -> None:
    """Check that a selection was made for these tensors. Its contents are not read here."""
    if not isinstance(selection, BlockSelection):
        raise bad_argument("selection", "a BlockSelection", type(selection).__name__, "make one with select_blocks or a policy")
    made_for = (*selection.counts.shape[:2], selection.q_len, selection.kv_len)
    needed = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if made_for != needed:
        raise bad_argument("selection", f"(batch, q_heads, q_len, kv_len) = {needed}", made_for, "select for these q, k and v")
    for part in (selection.indices, selection.counts):
        if part.device != q.device:
            raise bad_argument("selection", f"the device of q, {q.device}", part.device, "move it or select again")


def read_borders(
    name: str, cu_seqlens: Tensor, device: torch.device, total: int | None, longest_name: str, longest: int
) -> list[int]:
    """Check cumulative lengths, int32 ``(sequences + 1,)``, and return them as integers; on a GPU this waits for the device.

    They end at ``total`` unless it is None, and no length exceeds ``longest``, an argument called ``longest_name``.
    """
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or len(cu_seqlens) < 2:
        fix = "pass cumulative lengths that start at 0"
        raise bad_argument(name, "an int32 tensor (sequences + 1,)", describe(cu_seqlens), fix)
    if cu_seqlens.device.type != "cpu" and cu_seqlens.device != device:
        raise bad_argument(name, f"the device of q, {device}, or the CPU", cu_seqlens.device, "move it with .to()")
    borders: list[int] = cu_seqlens.tolist()
    lengths = [after - before for before, after in pairwise(borders)]
    if borders[0] != 0 or min(lengths) < 0 or (total is not None and borders[-1] != total):
        end = "" if total is None else f" and end at {total}"
        raise bad_argument(name, f"cumulative lengths that start at 0, never fall{end}", borders, "use cumsum of the lengths")
    if not is_size(longest) or max(lengths) > longest:
        expected = f"an integer >= the longest sequence, {max(lengths)}"
        raise bad_argument(longest_name, expected, repr(longest), f"take it from {name}")
    return borders


def check_sequences(starts: list[int], key_starts: list[int], prompt_lens: Sequence[int] | None) -> None:
    """Check that every sequence has at least as many keys as queries, and a prompt at least as long as its keys."""
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
        if prompt_lens is not None and (not is_size(prompt_lens[i]) or prompt_lens[i] < keys or prompt_lens[i] >= _LONGEST):
            expected = f"an integer < 2^31 and >= the {keys} keys of sequence {i}"
            raise bad_argument("prompt_lens", expected, repr(prompt_lens[i]), _COUNTS)


def check_cache(q: Tensor, k: Tensor, v: Tensor, page_table: Tensor) -> None:
    """Check packed queries against a paged cache; see :func:`check_qkv`."""
    if not isinstance(page_table, Tensor) or page_table.dim() != 2 or page_table.dtype != torch.int32:
        raise bad_argument("page_table", "an int32 tensor (sequences, max_pages)", describe(page_table), "convert it")
    for name, cache in (("k", k), ("v", v)):
        if not isinstance(cache, Tensor) or cache.dim() != 4 or cache.shape[1] == 0:
            expected = "a paged cache (pages, page_size >= 1, kv_heads, head_dim)"
            raise bad_argument(name, expected, describe(cache), "drop page_table for packed keys")
    _check_values(k, v)
    check_qkv(q, k[:, 0], v[:, 0], ("total", "heads", "dim"))
    if page_table.device != q.device:
        raise bad_argument("page_table", f"the device of q, {q.device}", page_table.device, "move it with .to()")


def check_pages(page_table: Tensor, key_starts: list[int], pages: int, page_size: int) -> None:
    """Check that a page table has a line for every sequence, and pages enough for its keys."""
    sequences, width = page_table.shape
    if sequences != len(key_starts) - 1:
        raise bad_argument("page_table", f"{len(key_starts) - 1} rows, one a sequence", sequences, "list every sequence")
    for i, (low, high) in enumerate(pairwise(key_starts)):
        needed = block_count(high - low, page_size)
        if width < needed:
            raise bad_argument("page_table", f"{needed} pages for sequence {i}", width, "widen the table")
        used = page_table[i, :needed]
        # On a GPU reading the table would wait for the device; kernels guard their own reads.
        if needed and page_table.device.type == "cpu" and not 0 <= int(used.min()) <= int(used.max()) < pages:
            raise bad_argument("page_table", f"pages 0 to {pages - 1} for sequence {i}", used.tolist(), "correct the table")


def _check_values(k: Tensor, v: Tensor) -> None:
    if v.shape[:-1] != k.shape[:-1]:
        expected = f"the shape of k but for the last dimension, {_shape(k)[:-1]}"
        raise bad_argument("v", expected, _shape(v)[:-1], "give one value for every key")


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)
