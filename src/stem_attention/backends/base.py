"""A backend: selects blocks and runs attention over a selection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from stem_attention.backends.dense import dense_attention
from stem_attention.backends.kept import nothing_kept, pack
from stem_attention.blocks import block_count
from stem_attention.call import Call, PackedBatch
from stem_attention.checks import check_selection
from stem_attention.errors import UnsupportedError, bad_argument
from stem_attention.policies.base import Policy, is_ours, softcap_for
from stem_attention.policies.patterns import keep_everything
from stem_attention.selection import BlockSelection


@dataclass(frozen=True)
class Request:
    """A caller's needs of a backend: where tensors lie, their dtype and last dimensions, and the tokens of a block.

    ``value_dim`` is the last dimension of values; given as that of queries and keys, it is None.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    block_size: int
    value_dim: int | None = None

    def __post_init__(self) -> None:
        if self.value_dim == self.head_dim:
            object.__setattr__(self, "value_dim", None)

    @classmethod
    def of(cls, q: Tensor, v: Tensor, block_size: int) -> Request:
        """Build for a call with these queries and values, ``(..., heads, dim)``."""
        return cls(q.device, q.dtype, q.shape[-1], block_size, v.shape[-1])


Results: TypeAlias = "tuple[Tensor, Tensor]"  # out and lse, or their gradients


class Backend(ABC):
    """Runs calls, which arrive checked. Tensors may have any outer strides."""

    name: str
    """Name to pass as ``backend=``."""

    crossover: int = 4096
    """Prompt length from which it was measured to beat dense attention (here: the torch backend on two CPU cores)."""

    caveat: str = ""
    """Describe what else of a call, which a :class:`Request` does not show, decides how it runs, as a clause."""

    @abstractmethod
    def why_not(self, request: Request) -> str | None:
        """Say why the backend cannot serve ``request``, as a clause; None when it can."""

    def only_by_name(self, request: Request) -> str | None:
        """Say why ``backend="auto"`` passes over a backend that can serve ``request``, as a clause; None where it does not."""
        return None

    @abstractmethod
    def attend(self, call: Call, selection: BlockSelection) -> tuple[Tensor, Tensor]:
        """Compute exact attention over the kept blocks of a call that is not packed; its policy does not matter.

        Returns:
            ``(out, lse)``: ``(batch, q_len, q_heads, value_dim)`` in the dtype of ``q``, and the natural log-sum-exp of the
            scaled scores, fp32 ``(batch, q_heads, q_len)``, or an empty tensor unless it is wanted.
        """

    def select(self, call: Call) -> BlockSelection:
        """Choose the blocks of a call that is not packed; unless a backend knows a faster way, as its policy does."""
        told = softcap_for(type(call.policy).__call__, call.softcap)
        return call.policy(call.q, call.k, call.v, scale=call.scale, prompt_len=call.prompt_len, **told)

    def chooser(self, policy: Policy) -> Callable[..., object]:
        """Return the function by which blocks are chosen, for :meth:`path` to name."""
        return type(policy).__call__

    def path(self, policy: Policy) -> tuple[str, ...]:
        """Name what runs from :meth:`forward` to what computes, one entry a hop: what selects "and" what attends."""
        computes = f"{qualified(self.chooser(policy))} and {type(self).__module__}.attention.attend"
        return qualified(self.forward), f"{qualified(self.select)} and {qualified(self.attend)}", computes

    def dense_limit(self, dense_below: int | None) -> int:
        """Return the prompt length under which calls run dense."""
        return self.crossover if dense_below is None else dense_below

    def runs_dense(self, call: Call) -> bool:
        """Decide whether a call that is not packed is too short to gain from sparsity."""
        return call.prompt_len < self.dense_limit(call.dense_below)

    def runner(self, call: Call) -> Callable[[Call], tuple[Tensor, Tensor]]:
        """Return what runs a call: :meth:`forward`, unless the backend has a faster way for it."""
        return self.forward

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """Select and attend, or attend densely where the prompt is too short to gain. Returns as :meth:`attend`.

        A packed batch runs one sequence at a time, which any policy understands; its ``lse`` is ``(q_heads, total_q)``.
        """
        results = None if call.batch is None else call.empty_results()
        for queries, part in call.sequences():
            short = self.runs_dense(part)
            if short and call.plain and not call.return_lse:
                out, lse = dense_attention(part.q, part.k, part.v, part.scale), part.empty_lse()
            elif short:
                out, lse = self.attend(part, keep_everything(part.q, part.k, part.policy.block_size))
            else:
                selection = check_chosen(part, self.select(part))
                out, lse = self.attend(part, selection)
                if part.kept is not None:
                    part.kept.add_(selection.counts.sum())
            if results is None:
                return out, lse
            results[0][queries] = out[0]
            if call.return_lse:
                results[1][:, queries] = lse[0]
        assert results is not None  # a call that is not packed is one sequence
        return results

    def attend_kept(self, call: Call, selection: BlockSelection) -> tuple[Tensor, Tensor, Tensor]:
        """Compute as :meth:`attend`, with the log-sum-exp, and return the kept pairs of blocks as bits besides."""
        return *self.attend(replace(call, return_lse=True), selection), pack(selection)

    def forward_kept(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """Compute as :meth:`forward`, with the log-sum-exp, and return besides what :meth:`backward` needs to know of it.

        Returns:
            ``(out, lse, kept)``: ``kept`` is the kept pairs of blocks, of the shape of :func:`kept_shape`.
        """
        if call.batch is None:
            short = self.runs_dense(call)
            selection = (
                keep_everything(call.q, call.k, call.policy.block_size) if short else check_chosen(call, self.select(call))
            )
            return self.attend_kept(call, selection)
        out, lse = replace(call, return_lse=True).empty_results()
        kept = nothing_kept(call)
        for i in _with_queries(call.batch):
            queries = slice(*call.batch.q_starts[i : i + 2])
            part_out, part_lse, bits = self.forward_kept(call.only(i))
            out[queries], lse[:, queries] = part_out[0], part_lse[0]
            kept[i, :, : bits.shape[2], : bits.shape[3]] = bits[0]
        return out, lse, kept

    def backward(self, call: Call, kept: Tensor, results: Results, d_results: Results) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v. Here a packed batch runs one sequence at a time; a backend does the rest.

        Args:
            call: The call, its policy of no interest beyond the block size.
            kept: The bits that :meth:`forward_kept` returned.
            results: ``(out, lse)`` that it returned. Weights are ``exp(scores - lse)``, whatever else the sum holds.
            d_results: The gradients of these two.
        """
        if call.batch is None:
            raise UnsupportedError(f"the {self.name} backend has no backward pass; run the call under torch.no_grad()")
        d_q, d_k, d_v = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (call.q, call.k, call.v))
        for i in _with_queries(call.batch):
            queries, keys = (slice(*starts[i : i + 2]) for starts in (call.batch.q_starts, call.batch.k_starts))
            (out, lse), (d_out, d_lse) = ((x[None, queries], y[None, :, queries]) for x, y in (results, d_results))
            found = self.backward(call.only(i), kept[i : i + 1], (out, lse), (d_out, d_lse))
            d_q[queries], d_k[keys], d_v[keys] = (x[0] for x in found)
        return d_q, d_k, d_v


def _with_queries(batch: PackedBatch) -> list[int]:
    return [i for i, (low, high) in enumerate(pairwise(batch.q_starts)) if low < high]


def check_chosen(call: Call, selection: BlockSelection) -> BlockSelection:
    """Return what a policy chose for a call, once it is known to fit: else a ValueError names the policy.

    What a user's policy put in it is read on a CPU only: a GPU would have to be waited for, and kernels guard their own reads.
    """
    policy = call.policy
    try:
        check_selection(selection, call.q, call.k)
        if is_ours(policy):
            return selection
        grid, num_blocks = selection.grid, block_count(call.prompt_len, policy.block_size)
        if selection.block_size != policy.block_size:
            raise bad_argument("block_size", f"the policy's, {policy.block_size}", selection.block_size, "pass self.block_size")
        most = max(policy.row_limits(num_blocks)[grid.first_row : grid.end_row], default=0)
        if selection.indices.shape[3] > most:
            raise bad_argument("indices", f"at most {most} ids a row", selection.indices.shape[3], "see row_limits()")
        if call.q.device.type == "cpu":
            selection.validate()
    except ValueError as error:
        fix = "build it with BlockSelection.from_mask or from_lists"
        raise bad_argument("policy", f"{type(policy).__name__} to choose blocks of this call", f"({error})", fix) from None
    return selection


def qualified(function: Callable[..., Any]) -> str:
    """Name a function as tracebacks would: its module, its class, itself."""
    return f"{function.__module__}.{function.__qualname__}"
