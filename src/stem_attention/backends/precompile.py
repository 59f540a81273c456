"""Fill Triton's cache with the kernels of a prefill before the first prompt comes, also where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stem_attention.backends.base import Packing
from stem_attention.backends.fused import FusedBackend
from stem_attention.backends.hopper import BLOCK_SIZES, HEAD_DIMS, HopperBackend
from stem_attention.backends.triton import BLOCK_SIZES as PORTABLE_BLOCK_SIZES
from stem_attention.backends.triton import HEAD_DIMS as PORTABLE_HEAD_DIMS
from stem_attention.backends.triton import TritonBackend
from stem_attention.config import StemConfig
from stem_attention.errors import bad_argument

if TYPE_CHECKING:
    from stem_attention.backends.triton.offline import Compilation


@dataclass(frozen=True)
class Calls:
    """The calls to compile for.

    Attributes:
        lengths: Prompt lengths. Kernels differ by the power of two of the number of blocks alone.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Dimension of a head.
        dtype: bfloat16 or float16.
        page_size: Tokens of a page, to compile for packed batches over a paged cache too; None leaves them out.
    """

    lengths: Sequence[int]
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    page_size: int | None = None


def precompile(architecture: str, calls: Calls, config: StemConfig, on_kernel: Callable[[Compilation], None]) -> str:
    """Compile what ``stem_attention`` launches for these calls on a card, wherever this runs.

    Args:
        architecture: ``"sm90"`` and the like.
        calls: What will be called.
        config: What to keep.
        on_kernel: Called for every kernel when it is compiled or found in the cache.

    Returns:
        The backend that runs such calls there.

    Raises:
        ValueError: It is no NVIDIA architecture of compute capability 8.0 or later, or no kernel takes these sizes.
    """
    if calls.head_dim not in PORTABLE_HEAD_DIMS:
        raise bad_argument("head_dim", "a multiple of 8 between 16 and 256", calls.head_dim, "no kernel takes others")
    if config.block_size not in PORTABLE_BLOCK_SIZES:
        raise bad_argument("block_size", "64 or 128", config.block_size, "no kernel takes others")
    from stem_attention.backends.triton.offline import offline

    fits = calls.head_dim in HEAD_DIMS and config.block_size in BLOCK_SIZES
    backend: FusedBackend = HopperBackend() if architecture == "sm90" and fits else TritonBackend()
    always, scale = replace(config, dense_below=0, head_factors=_any_factors(config, calls.heads)), calls.head_dim**-0.5
    with offline(architecture, on_kernel):
        for length in calls.lengths:
            q, k = _empty(calls, length, calls.heads), _empty(calls, length, calls.kv_heads)
            backend.forward(q, k, k, always, scale, length, False)
            if calls.page_size is not None:
                pages = -(-length // calls.page_size)
                cache = k.new_empty((pages, calls.page_size, calls.kv_heads, calls.head_dim))
                table = k.new_empty((1, pages), dtype=torch.int32)
                packing = Packing((0, length), (0, length))
                backend.forward_varlen(q[0], cache, cache, packing, table, always, scale, (length,), False)
    return backend.name


def _any_factors(config: StemConfig, heads: int) -> tuple[tuple[float, ...]] | None:
    """Kernels differ by whether there are factors, not by the layer or the rank whose factors they are."""
    return None if config.head_factors is None else ((1.0,) * heads,)


def _empty(calls: Calls, length: int, heads: int) -> Tensor:
    return torch.empty((1, length, heads, calls.head_dim), dtype=calls.dtype, device="meta")
