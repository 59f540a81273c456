"""Launches of the gradient's kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stem_attention.backends.base import Results
from stem_attention.backends.triton.attention import in_base_two
from stem_attention.backends.triton.backward_kernels import delta_kernel, dkv_kernel, dq_kernel, sum_kernel
from stem_attention.backends.triton.kept import Columns, list_columns, list_rows
from stem_attention.backends.triton.launch import BackwardLaunch, architecture, backward_launch, has_tma
from stem_attention.backends.triton.layout import Layout, describable
from stem_attention.backends.triton.pieces import LIST_BYTES
from stem_attention.backends.triton.program import Launches
from stem_attention.call import Call

PARTS_BYTES = 256 << 20
"""Bytes that the partial sums of key blocks may take that most rows keep."""

_MOST_CHUNKS = 1024
_HEAVY_ROWS = 4

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # q, k, v, d_out, all of four axes, lse, delta, of three
Chunks = tuple[Tensor, Tensor, Tensor, Tensor]  # the gradients of k and v, and the partial sums of both
Scales = tuple[float, float, float | None]  # of the gradients, and those of in_base_two
StartChunks = Callable[[Layout, int, Inputs, Chunks, Columns, Scales, Launches], None]


def backward(
    call: Call, kept: Tensor, results: Results, d_results: Results, launches: Launches, start: StartChunks | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; arguments as :meth:`Backend.backward`, for packed batches too.

    ``start`` launches the sums over chunks of key blocks' lists; unless given, :func:`start_chunks`, the portable kernel.

    Lists of some kv heads and their query heads are made and used at a time, so that they take no more room than a forward
    pass's.
    """
    size, (out, lse), (d_out, d_lse) = call.policy.block_size, results, d_results
    q, k, v, out, d_out = (x[None] if x.dim() == 3 else x for x in (call.q, call.k, call.v, out, d_out))
    lse, d_lse = (x[None] if x.dim() == 2 else x for x in (lse, d_lse))
    if not describable(d_out):  # an expanded one, for instance: that of a sum
        d_out = d_out.contiguous()
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    tokens, tile = out.shape[1], 64
    d_lse = d_lse.contiguous()
    launches.start(
        delta_kernel, (triton.cdiv(tokens, tile), out.shape[2], out.shape[0]), out, d_out, d_lse, delta,
        *out.stride()[:3], *d_out.stride()[:3], *d_lse.stride()[:2], *delta.stride()[:2], tokens,
        TILE=tile, DV=v.shape[3], BDV=triton.next_power_of_2(v.shape[3]), num_warps=4,
    )  # fmt: skip
    layout, scales = Layout.of(call, size, launches), (call.scale, *in_base_two(call.scale, call.softcap))
    pairs = _most_pairs(call, size)
    step = max(1, LIST_BYTES // max(1, 4 * layout.group * pairs))
    for first in range(0, layout.kv_heads, step):
        keys = slice(first, min(first + step, layout.kv_heads))
        queries = slice(keys.start * layout.group, keys.stop * layout.group)
        part = replace(layout, heads=queries.stop - queries.start, kv_heads=keys.stop - keys.start)
        own_q, own_do, own_dq = (x[:, :, queries] for x in (q, d_out, grads[0]))
        own_k, own_v, own_dk, own_dv = (x[:, :, keys] for x in (k, v, *grads[1:]))
        own_lse, own_delta, own_kept = (x[:, queries] for x in (lse, delta, kept))
        inputs, most = (own_q, own_k, own_v, own_do, own_lse, own_delta), pairs * part.heads
        d_queries(part, size, inputs, own_dq, *list_rows(own_kept, layout.blocks, most, launches), scales, launches)
        chunks = most_chunks(size, v.shape[3] + q.shape[3])
        columns = list_columns(own_kept, layout.group, layout.blocks, most, chunks, launches)
        d_keys_values(part, size, inputs, (own_dk, own_dv), columns, scales, launches, start or start_chunks)
        launches.forget()  # the lists of one step are enough
    d_q, d_k, d_v = (x.view(y.shape) for x, y in zip(grads, (call.q, call.k, call.v), strict=True))
    return d_q, d_k, d_v


def d_queries(
    layout: Layout, size: int, inputs: Inputs, d_q: Tensor, lists: Tensor, starts: Tensor, scales: Scales, launches: Launches
) -> None:  # fmt: skip
    """Fill ``d_q``, by the key blocks of each row."""
    q, k, v, d_out, lse, delta = inputs
    rectangular = not layout.packed and describable(k) and describable(v)
    choice = _choice("dq", q, v, size, rectangular)
    k_tiles, v_tiles = (_tiles(x, choice.tile) if choice.tma else None for x in (k, v))
    launches.start(
        dq_kernel, (layout.rows * layout.heads, layout.batch, size // choice.own),
        q, k, v, k_tiles, v_tiles, d_out, lse, delta, d_q, lists, starts, layout.cu_q, layout.cu_k,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *d_out.stride()[:3], *d_q.stride()[:3], *lse.stride()[:2],
        *delta.stride()[:2], layout.q_len, layout.kv_len, layout.heads, layout.rows, min(_HEAVY_ROWS, layout.rows), *scales,
        G=layout.group, B=size, BM=choice.own, BN=choice.tile, **_dims(q, v), RAGGED=layout.packed, TMA=choice.tma,
        **choice.options,
    )  # fmt: skip


def d_keys_values(
    layout: Layout, size: int, inputs: Inputs, results: tuple[Tensor, Tensor], columns: Columns, scales: Scales,
    launches: Launches, start: StartChunks,
) -> None:  # fmt: skip
    """Fill the gradients of keys and values, by the rows that keep each block; ``start`` launches what fills the chunks."""
    q, _, v = inputs[:3]
    dims = _dims(q, v)
    sums_k, sums_v = (
        torch.empty((columns.room, size, dims[name]), dtype=torch.float32, device=q.device) for name in ("BD", "BDV")
    )
    start(layout, size, inputs, (*results, sums_k, sums_v), columns, scales, launches)
    tile = min(8, size)
    launches.start(
        sum_kernel, (len(columns.chunks), size // tile), sums_k, sums_v, *results, columns.chunks, columns.slots, layout.cu_k,
        *results[0].stride()[:3], *results[1].stride()[:3], layout.kv_len, layout.kv_heads, layout.blocks,
        B=size, TILE=tile, **dims, RAGGED=layout.packed, num_warps=4,
    )  # fmt: skip


def start_chunks(
    layout: Layout, size: int, inputs: Inputs, results: Chunks, columns: Columns, scales: Scales, launches: Launches
) -> None:  # fmt: skip
    """Launch the portable kernel for all chunks of all key blocks."""
    q, k, v, d_out, lse, delta = inputs
    rectangular = not layout.packed and describable(q) and describable(d_out)
    choice = _choice("dkv", q, v, size, rectangular)
    q_tiles, do_tiles = (_tiles(x, choice.tile) if choice.tma else None for x in (q, d_out))
    launches.start(
        dkv_kernel, (len(columns.owners), size // choice.own),
        q, k, v, q_tiles, do_tiles, d_out, lse, delta, *results, columns.lists, columns.starts, columns.owners,
        columns.firsts, columns.slots, columns.longest, layout.cu_q, layout.cu_k,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *d_out.stride()[:3], *results[0].stride()[:3],
        *results[1].stride()[:3], *lse.stride()[:2], *delta.stride()[:2], layout.q_len, layout.kv_len, layout.kv_heads,
        layout.rows, layout.blocks, len(columns.chunks), *scales,
        G=layout.group, B=size, BK=choice.own, BM=choice.tile, **_dims(q, v), RAGGED=layout.packed, TMA=choice.tma,
        **choice.options,
    )  # fmt: skip


def most_chunks(size: int, dims: int) -> int:
    """Return how many parts the lists of key blocks are cut into at most: twice as many may need room for a partial sum."""
    return min(_MOST_CHUNKS, PARTS_BYTES // (2 * 4 * size * dims))


def _most_pairs(call: Call, size: int) -> int:
    """Pairs of blocks that one head may keep in all sequences."""
    if call.batch is None:
        return call.q.shape[0] * call.grid.causal_pairs
    return call.batch.once(("pairs", size), lambda: _pairs_of(call, size))


def _pairs_of(call: Call, size: int) -> int:
    assert call.batch is not None
    return sum(call.batch.grid(i, size).causal_pairs for i in range(call.batch.sequences))


def _choice(kernel: str, q: Tensor, v: Tensor, size: int, descriptors: bool) -> BackwardLaunch:
    card = architecture(q.device)
    return backward_launch(kernel, card, max(q.shape[3], v.shape[3]), size, descriptors and has_tma(card))


def _tiles(x: Tensor, tile: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, tile, 1, triton.next_power_of_2(x.shape[3])])


def _dims(q: Tensor, v: Tensor) -> dict[str, int]:
    dim, v_dim = q.shape[3], v.shape[3]
    return {"D": dim, "BD": triton.next_power_of_2(dim), "DV": v_dim, "BDV": triton.next_power_of_2(v_dim)}
