"""The library as torch operators, so that torch.compile sees opaque calls with known shapes.

Operators take no dataclasses: a policy travels as its JSON text, a selection as its two tensors and a packed batch as its
borders. They are defined plainly, which costs a call 0.1 ms less than ``torch.library.custom_op``. Autograd goes through none
of these: calls that need a gradient run the operators of ``gradients.py``.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

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
any_policy = lru_cache(maxsize=64)(Dense)


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


def arrived_selection(q: Tensor, k: Tensor, indices: Tensor, counts: Tensor, block_size: int) -> BlockSelection:
    """Return the selection that travels as these tensors."""
    selection = BlockSelection(indices, counts, block_size, q.shape[1], k.shape[1])
    if q.device.type == "cpu":  # on a GPU this would wait for the device; kernels guard their own reads
        selection.validate()
    return selection


def _forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, policy: str, scale: float, softcap: float | None, prompt_len: int,
    dense_below: int | None, return_lse: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    known = arrived(policy)
    return backends.run(
        Call(q, k, v, known, scale, prompt_len, None, dense_below, return_lse, backend, sinks=sinks, softcap=softcap)
    )


def _forward_varlen(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, q_starts: Sequence[int], k_starts: Sequence[int],
    page_table: Tensor | None, prompt_lens: Sequence[int], policy: str, scale: float, softcap: float | None,
    dense_below: int | None, return_lse: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch = PackedBatch.of_starts(q_starts, k_starts, prompt_lens, page_table, q.device)
    return backends.run(
        Call(q, k, v, arrived(policy), scale, 0, batch, dense_below, return_lse, backend, sinks=sinks, softcap=softcap)
    )


def _select(
    q: Tensor, k: Tensor, v: Tensor, policy: str, scale: float, softcap: float | None, prompt_len: int, backend: str
) -> tuple[Tensor, Tensor]:
    known = arrived(policy)
    selection = backends.select(Call(q, k, v, known, scale, prompt_len, backend=backend, softcap=softcap))
    missing = _widest_row(known, selection.grid, prompt_len) - selection.indices.shape[3]
    indices = torch.nn.functional.pad(selection.indices, (0, missing), value=PAD) if missing > 0 else selection.indices
    return indices, selection.counts


def _attend(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, indices: Tensor, counts: Tensor, block_size: int, scale: float,
    softcap: float | None, window: int | None, return_lse: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    selection = arrived_selection(q, k, indices, counts, block_size)
    given: dict[str, Any] = {"sinks": sinks, "softcap": softcap, "window": window}
    known = any_policy(block_size)
    call = Call(q, k, v, known, scale, k.shape[1], return_lse=return_lse, backend=backend, **given)
    return backends.attend(call, selection)


def _widest_row(policy: Policy, grid: BlockGrid, prompt_len: int) -> int:
    """Width of a selection's lists. Rows may turn out shorter, but compiled graphs rely on this."""
    return max(policy.row_limits(block_count(prompt_len, grid.block_size))[grid.first_row : grid.end_row], default=0)


def _fake_select(
    q: Tensor, k: Tensor, v: Tensor, policy: str, scale: float, softcap: float | None, prompt_len: int, backend: str
) -> tuple[Tensor, Tensor]:
    known = arrived(policy)
    grid = BlockGrid.of(q, k, known.block_size)
    width: int | torch.SymInt
    if all(isinstance(length, int) for length in (prompt_len, grid.q_len, grid.kv_len)):
        rows, width = grid.rows, _widest_row(known, grid, prompt_len)
    else:  # symbolic lengths: the widest row is known only when the call runs
        rows, width = grid.key_blocks - grid.first_row, torch.library.get_ctx().new_dynamic_size()
    shape = (q.shape[0], q.shape[2], rows)
    return q.new_empty((*shape, width), dtype=torch.int32), q.new_empty(shape, dtype=torch.int32)


def _fake_attention(*args: object) -> tuple[Tensor, Tensor]:
    """Shapes of what every attention operator returns; all end in ``return_lse, backend`` and packed queries have 3 axes."""
    q, v, return_lse = args[0], args[2], args[-2]
    assert isinstance(q, Tensor)
    assert isinstance(v, Tensor)
    shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    lse = q.new_empty(shape if return_lse else (0,), dtype=torch.float32)
    return torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device), lse


def define(run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define the operator ``stem_attention::name`` for a function ``_name``, with what tells its results' shapes."""
    name = run.__name__[1:]
    torch.library.define(f"{NAMESPACE}::{name}", torch.library.infer_schema(run, mutates_args=()))
    torch.library.impl(f"{NAMESPACE}::{name}", "CompositeExplicitAutograd", run)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


forward = define(_forward, _fake_attention)
forward_varlen = define(_forward_varlen, _fake_attention)
select = define(_select, _fake_select)
attend = define(_attend, _fake_attention)
