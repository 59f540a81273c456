"""The library as torch operators, so that torch.compile sees opaque calls with known shapes.

Operators take no dataclasses: each takes the fields of :class:`Arguments`, where a policy is its JSON text, a selection its two
tensors and a packed batch its borders. They are defined plainly, which costs a call 0.1 ms less than
``torch.library.custom_op``. Autograd goes through none of these: calls that need a gradient run those of ``gradients.py``.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stem_attention import backends
from stem_attention.blocks import BlockGrid, block_count
from stem_attention.call import Call, PackedBatch
from stem_attention.policies.base import Policy
from stem_attention.policies.patterns import Dense
from stem_attention.policies.spec import policy_from_json
from stem_attention.selection import PAD, BlockSelection

NAMESPACE = "stem_attention"  # of the operators; another version of the library in the process has its own

# Policies by the text they travel as. Kept for good: a compiled graph may ask for one at any time, and they are few and small.
_TRAVELLING: dict[str, Policy] = {}
_any_policy = lru_cache(maxsize=64)(Dense)


def travel(policy: Policy) -> str:
    """Return the text under which the operators find a policy, its class importable or not."""
    text = policy.to_json()
    if not torch.compiler.is_compiling() and _TRAVELLING.get(text) is not policy:
        _TRAVELLING[text] = policy
    return text


def arrived(text: str) -> Policy:
    """Return the policy that travels as this text."""
    if text not in _TRAVELLING:
        _TRAVELLING[text] = policy_from_json(text)
    return _TRAVELLING[text]


class Arguments(NamedTuple):
    """A call, and the lists to attend over where those are given, as every operator takes them.

    They are what :class:`Call` describes; a call that is not packed has no starts, and one prompt length. Lists that are given
    have no policy, but a block size.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    policy: str | None
    scale: float
    softcap: float | None
    prompt_lens: Sequence[int]
    backend: str
    dense_below: int | None = None
    return_lse: bool = False
    window: int | None = None
    q_starts: Sequence[int] | None = None
    k_starts: Sequence[int] | None = None
    block_size: int = 0
    page_table: Tensor | None = None
    indices: Tensor | None = None
    counts: Tensor | None = None

    @property
    def known(self) -> Policy:
        """The policy, or any with blocks of that size."""
        return _any_policy(self.block_size) if self.policy is None else arrived(self.policy)

    def call(self) -> Call:
        """Describe the call again."""
        batch, prompt_len = None, self.prompt_lens[0]
        if self.q_starts is not None and self.k_starts is not None:
            starts, prompt_len = (self.q_starts, self.k_starts), 0
            batch = PackedBatch.of_starts(*starts, self.prompt_lens, self.page_table, self.q.device)
        return Call(
            self.q, self.k, self.v, self.known, self.scale, prompt_len, batch, self.dense_below,
            self.return_lse, self.backend, sinks=self.sinks, softcap=self.softcap, window=self.window,
        )  # fmt: skip

    def selection(self) -> BlockSelection | None:
        """Return the lists to attend over, if they are given."""
        if self.indices is None or self.counts is None:
            return None
        selection = BlockSelection(self.indices, self.counts, self.block_size, self.q.shape[1], self.k.shape[1])
        if self.q.device.type == "cpu":  # on a GPU this would wait for the device; kernels guard their own reads
            selection.validate()
        return selection


_SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor? sinks, str? policy, float scale, float? softcap, SymInt[] prompt_lens, str backend, "
    "SymInt? dense_below=None, bool return_lse=False, SymInt? window=None, SymInt[]? q_starts=None, SymInt[]? k_starts=None, "
    "SymInt block_size=0, Tensor? page_table=None, Tensor? indices=None, Tensor? counts=None"
)


def define(run: Callable[..., Any], fake: Callable[..., Any], results: int, before: str = "") -> Any:
    """Define the operator ``stem_attention::name`` for a function ``_name``, with what tells its results' shapes.

    It takes the fields of :class:`Arguments`, behind those ``before`` if it takes others, and returns so many tensors.
    """
    name = run.__name__[1:]
    torch.library.define(f"{NAMESPACE}::{name}", f"({before}{_SCHEMA}) -> ({', '.join(['Tensor'] * results)})")
    torch.library.impl(f"{NAMESPACE}::{name}", "CompositeExplicitAutograd", run)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _attention(*given: Any) -> tuple[Tensor, Tensor]:
    arguments = Arguments(*given)
    return backends.run(arguments.call(), arguments.selection())


def _select(*given: Any) -> tuple[Tensor, Tensor]:
    call = Arguments(*given).call()
    selection = backends.select(call)
    missing = _widest_row(call.policy, selection.grid, call.prompt_len) - selection.indices.shape[3]
    indices = torch.nn.functional.pad(selection.indices, (0, missing), value=PAD) if missing > 0 else selection.indices
    return indices, selection.counts


def _widest_row(policy: Policy, grid: BlockGrid, prompt_len: int) -> int:
    """Width of a selection's lists. Rows may turn out shorter, but compiled graphs rely on this."""
    return max(policy.row_limits(block_count(prompt_len, grid.block_size))[grid.first_row : grid.end_row], default=0)


def _fake_select(*given: Any) -> tuple[Tensor, Tensor]:
    arguments = Arguments(*given)
    q, known = arguments.q, arguments.known
    grid, prompt_len = BlockGrid.of(q, arguments.k, known.block_size), arguments.prompt_lens[0]
    width: int | torch.SymInt
    if all(isinstance(length, int) for length in (prompt_len, grid.q_len, grid.kv_len)):
        rows, width = grid.rows, _widest_row(known, grid, prompt_len)
    else:  # symbolic lengths: the widest row is known only when the call runs
        rows, width = grid.key_blocks - grid.first_row, torch.library.get_ctx().new_dynamic_size()
    shape = (q.shape[0], q.shape[2], rows)
    return q.new_empty((*shape, width), dtype=torch.int32), q.new_empty(shape, dtype=torch.int32)


def fake_attention(*given: Any) -> tuple[Tensor, Tensor]:
    """Return tensors of the shapes of a call's results."""
    arguments = Arguments(*given)
    q, v = arguments.q, arguments.v
    shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    lse = q.new_empty(shape if arguments.return_lse else (0,), dtype=torch.float32)
    return torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device), lse


attention = define(_attention, fake_attention, results=2)
select = define(_select, _fake_select, results=2)
