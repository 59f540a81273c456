"""Fill Triton's cache with the kernels of a prefill before the first prompt comes, also where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from stem_attention.backends import hopper, triton
from stem_attention.blocks import block_count
from stem_attention.call import Call, PackedBatch
from stem_attention.errors import bad_argument
from stem_attention.policies.base import Policy
from stem_attention.policies.mass import Mass

if TYPE_CHECKING:
    from stem_attention.backends.triton.offline import Compilation


@dataclass(frozen=True)
class Calls:
    """The calls to compile for, in bfloat16 or float16; kernels differ by the power of two of the number of blocks alone.

    With a ``page_size``, tokens of a page, packed batches over a paged cache are compiled for too. ``value_dim`` is that of
    keys unless given. ``sinks`` and ``softcap`` say that every call has them; sinks are of the dtype of queries.
    """

    lengths: Sequence[int]
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    page_size: int | None = None
    value_dim: int | None = None
    sinks: bool = False
    softcap: bool = False


def precompile(architecture: str, calls: Calls, policy: Policy, on_kernel: Callable[[Compilation], None]) -> str:
    """Compile what calls launch on an architecture such as ``"sm90"``, and return the name of the backend that runs them there.

    The policy is one of the library that selects on the device. ``on_kernel`` hears of each kernel, compiled or found in cache.

    Raises:
        ValueError: It is no NVIDIA architecture of compute capability 8.0 or later, or no kernel takes these sizes.
    """
    if calls.head_dim not in triton.HEAD_DIMS:
        raise bad_argument("head_dim", triton.TritonBackend.head_dims_said, calls.head_dim, "no kernel takes others")
    value_dim = calls.head_dim if calls.value_dim is None else calls.value_dim
    if (obstacle := triton.TritonBackend().value_obstacle(calls.head_dim, value_dim)) is not None:
        raise bad_argument("value_dim", "one that a kernel takes", value_dim, obstacle)
    if policy.block_size not in triton.BLOCK_SIZES:
        raise bad_argument("block_size", "64 or 128", policy.block_size, "no kernel takes others")
    from stem_attention.backends.triton.offline import offline

    fits = architecture == "sm90" and hopper.HEAD_DIMS.get(calls.head_dim) == value_dim
    backend: triton.TritonBackend = hopper.HopperBackend() if fits else triton.TritonBackend()
    if backend.selector(policy) is None:
        fix = "compile for mass, stem or one of its presets; its own code selects at run time"
        raise bad_argument("policy", "one with kernels of its own", policy.name, fix)
    # Kernels differ by whether there are factors, not by the layer or the rank whose factors they are.
    if isinstance(policy, Mass) and policy.head_factors is not None:
        policy = replace(policy, head_factors=((1.0,) * calls.heads,))
    scale = calls.head_dim**-0.5
    form: dict[str, Any] = {"softcap": 1.0 if calls.softcap else None}
    if calls.sinks:
        form["sinks"] = torch.empty(calls.heads, dtype=calls.dtype, device="meta")
    with offline(architecture, on_kernel):
        for length in calls.lengths:
            q = torch.empty((1, length, calls.heads, calls.head_dim), dtype=calls.dtype, device="meta")
            k, v = (q.new_empty((1, length, calls.kv_heads, dim)) for dim in (calls.head_dim, value_dim))
            backend.fused(Call(q, k, v, policy, scale, length, dense_below=0, **form))
            if calls.page_size is not None:
                pages = block_count(length, calls.page_size)
                k, v = (x.new_empty((pages, calls.page_size, *x.shape[2:])) for x in (k, v))
                table = k.new_empty((1, pages), dtype=torch.int32)
                batch = PackedBatch.plan([length], [length], page_table=table, device=q.device)
                kept = k.new_empty(1, dtype=torch.int64)  # servers count
                backend.fused(Call(q[0], k, v, policy, scale, batch=batch, dense_below=0, kept=kept, **form))
    return backend.name
