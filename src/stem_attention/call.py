"""A call of attention, described once when it enters: tensors, where their sequences lie, the policy, what is wanted."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from stem_attention.blocks import BlockGrid, block_count
from stem_attention.policies.base import Policy

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Sequences of different lengths packed along one dimension, their keys optionally in a paged cache.

    A host builds one for each step with :meth:`plan`, and all layers of the model share it and what :meth:`once` keeps.

    Attributes:
        q_starts: Where each sequence's queries start, and the total: ``(0, 3, 10)`` for lengths 3 and 7.
        k_starts: The same for keys; with a page table just their differences count.
        prompt_lens: Tokens of each sequence's whole prompt.
        cu_q: int32 ``(sequences + 1,)``, ``q_starts`` on the device.
        cu_k: int32 ``(sequences + 1,)``, ``k_starts`` on the device.
        page_table: int32 ``(sequences, max_pages)``, the page of the cache that holds each run of ``page_size`` keys; or None.
    """

    q_starts: tuple[int, ...]
    k_starts: tuple[int, ...]
    prompt_lens: tuple[int, ...]
    cu_q: Tensor
    cu_k: Tensor
    page_table: Tensor | None = None
    _kept: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def plan(
        cls, q_lens: Sequence[int], kv_lens: Sequence[int], *, prompt_lens: Sequence[int] | None = None,
        page_table: Tensor | None = None, device: torch.device,
    ) -> PackedBatch:  # fmt: skip
        """Describe a batch, with one copy to the device that nothing waits for.

        Args:
            q_lens: Queries of each sequence.
            kv_lens: Keys of each sequence, its cached ones included.
            prompt_lens: Tokens of each whole prompt; ``kv_lens`` unless given.
            page_table: int32 ``(sequences, max_pages)``.
            device: Where q, k and v lie.
        """
        q_starts, k_starts = (tuple(accumulate(lengths, initial=0)) for lengths in (q_lens, kv_lens))
        return cls.of_starts(q_starts, k_starts, tuple(kv_lens if prompt_lens is None else prompt_lens), page_table, device)

    @classmethod
    def of_starts(
        cls, q_starts: Sequence[int], k_starts: Sequence[int], prompt_lens: Sequence[int], page_table: Tensor | None,
        device: torch.device,
    ) -> PackedBatch:  # fmt: skip
        """Build as :meth:`plan` does, from cumulative lengths."""
        # Tables begin at multiples of 16 bytes: Triton compiles kernels of their own for others, in the midst of serving.
        if page_table is not None and (page_table.stride(1) != 1 or page_table.data_ptr() % 16):
            page_table = page_table.clone(memory_format=torch.contiguous_format)
        filler = [0] * (-len(q_starts) % 4)
        cu_q, cu_k = to_device([[*q_starts, *filler], [*k_starts, *filler]], torch.int32, device)[:, : len(q_starts)]
        return cls(tuple(q_starts), tuple(k_starts), tuple(prompt_lens), cu_q, cu_k, page_table)

    @property
    def sequences(self) -> int:
        """Sequences in the batch."""
        return len(self.prompt_lens)

    @property
    def max_q(self) -> int:
        """Most queries of a sequence."""
        return self.once("max_q", lambda: max((b - a for a, b in pairwise(self.q_starts)), default=0))

    @property
    def max_k(self) -> int:
        """Most keys of a sequence."""
        return self.once("max_k", lambda: max((b - a for a, b in pairwise(self.k_starts)), default=0))

    def grid(self, sequence: int, block_size: int) -> BlockGrid:
        """Rows and columns of one sequence."""
        (q0, q1), (k0, k1) = self.q_starts[sequence : sequence + 2], self.k_starts[sequence : sequence + 2]
        return BlockGrid(q1 - q0, k1 - k0, block_size)

    def once(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """Return ``make()``, kept with the batch: what all layers of a step need is made by the first of them."""
        if key not in self._kept:
            self._kept[key] = make()
        return cast("_T", self._kept[key])

    def sequence(self, x: Tensor, i: int) -> Tensor:
        """Keys or values of one sequence, ``(length, kv_heads, dim)``, gathered from their pages where they lie in pages."""
        low, high = self.k_starts[i : i + 2]
        if self.page_table is None:
            return x[low:high]
        pages = self.page_table[i, : block_count(high - low, x.shape[1])].long()
        return x[pages].flatten(0, 1)[: high - low]


@dataclass(frozen=True, eq=False)
class Call:
    """Describe a call to a backend. Everything in it has been checked.

    Attributes:
        q: ``(batch, q_len, q_heads, dim)``; packed, ``(total_q, q_heads, dim)``.
        k: ``(batch, kv_len, kv_heads, dim)``; packed, ``(total_k, kv_heads, dim)``; paged, the cache
            ``(pages, page_size, kv_heads, dim)``, of the dtype of ``q`` or fp8 (e4m3).
        v: The shape of ``k`` but for the last dimension, which the result has.
        policy: What to keep.
        scale: Softmax scale.
        prompt_len: Tokens of the whole prompt, the same for all sequences; a packed batch has its own.
        batch: Where the sequences of a packed batch lie, or None.
        dense_below: Prompts of fewer tokens run dense; None leaves that to the backend.
        return_lse: Whether the log-sum-exp is wanted.
        backend: Name of the backend, or ``"auto"``.
        out: Where the result goes, a contiguous tensor like ``q`` of the last dimension of ``v``; None for a new one.
        kept: int64 ``(1,)``, to which the block pairs that a policy keeps are added, of all heads; None: they are not counted.
        sinks: ``(q_heads,)``, a logit of each head that takes part in its softmax and has no value; or None.
        softcap: Bound of the scaled scores ``s``, which become ``softcap * tanh(s / softcap)``; or None.
        window: Keys that a query sees at most, its own and those right before it; or None.
        k_scale: What the keys of an fp8 cache are multiplied by, fp32, one number or ``(kv_heads,)``; None for other keys.
        v_scale: The same for values; both are given or none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    policy: Policy
    scale: float
    prompt_len: int = 0
    batch: PackedBatch | None = None
    dense_below: int | None = None
    return_lse: bool = False
    backend: str = "auto"
    out: Tensor | None = None
    kept: Tensor | None = None
    sinks: Tensor | None = None
    softcap: float | None = None
    window: int | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Tell whether it asks for nothing but scaled scores, as torch's own attention computes them."""
        return self.sinks is None and self.softcap is None and self.window is None

    @property
    def paged(self) -> bool:
        """Tell whether keys lie in pages."""
        return self.batch is not None and self.batch.page_table is not None

    @property
    def grid(self) -> BlockGrid:
        """Rows and columns of a call that is not packed."""
        return BlockGrid.of(self.q, self.k, self.policy.block_size)

    def sequences(self) -> Iterator[tuple[slice, Call]]:
        """Yield where the queries of each sequence that has any lie, and its call as a batch of one; not packed, the call."""
        if self.batch is None:
            yield slice(None), self
            return
        for i, (low, high) in enumerate(pairwise(self.batch.q_starts)):
            if low < high:
                yield slice(low, high), self.only(i)

    def only(self, sequence: int) -> Call:
        """Return the call of one sequence of a packed batch, as a batch of one."""
        batch = self.batch
        assert batch is not None
        low, high = batch.q_starts[sequence : sequence + 2]
        k, v = (batch.sequence(x, sequence)[None] for x in (self.k, self.v))
        prompt_len = batch.prompt_lens[sequence]
        return replace(self, q=self.q[None, low:high], k=k, v=v, prompt_len=prompt_len, batch=None, out=None)

    def with_packed(self, k: Tensor, v: Tensor) -> Call:
        """Return the call with the keys and values of its pages packed, ``(total_k, kv_heads, dim)`` in the dtype of ``q``."""
        batch = self.batch
        assert batch is not None
        packed = batch.once("packed", lambda: replace(batch, page_table=None, _kept={}))
        return replace(self, k=k, v=v, batch=packed, k_scale=None, v_scale=None)

    def empty_results(self) -> tuple[Tensor, Tensor]:
        """Make room for ``out``, unless the caller has, and for ``lse``."""
        return self.empty_out(), self.empty_lse()

    def empty_out(self) -> Tensor:
        """Make room for ``out``, unless the caller has."""
        if self.out is not None:
            return self.out
        return torch.empty((*self.q.shape[:-1], self.v.shape[-1]), dtype=self.q.dtype, device=self.q.device)

    def empty_lse(self) -> Tensor:
        """Make room for ``lse``: fp32 ``(batch, q_heads, q_len)``, packed ``(q_heads, total_q)``, ``(0,)`` unless wanted."""
        q, shape = self.q, [0]
        if self.return_lse:
            shape = [q.shape[1], q.shape[0]] if self.batch is not None else [q.shape[0], q.shape[2], q.shape[1]]
        return torch.empty(shape, dtype=torch.float32, device=q.device)


def to_device(numbers: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy host numbers to a device without waiting for it."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype, device=device)
    return torch.tensor(numbers, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
