"""The library as torch operators, so that torch.compile sees opaque calls with known shapes.

Operators take no dataclasses: a config travels as its JSON text and a selection as its two tensors. They are defined
plainly, which costs a call 0.1 ms less than ``torch.library.custom_op``; gradients are refused before they run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from stem_attention.backends import Backend, Packing, Request, get_backend
from stem_attention.backends.dense import without_autocast
from stem_attention.config import StemConfig
from stem_attention.policies.budget import block_count, row_budgets
from stem_attention.selection import PAD, BlockSelection

_parse = lru_cache(maxsize=256)(StemConfig.from_json)


def _backend(q: Tensor, block_size: int, name: str) -> Backend:
    return get_backend(Request.of(q, block_size), name)


_P = ParamSpec("_P")
_R = TypeVar("_R")


def _guarded(op: Callable[Concatenate[Tensor, _P], _R]) -> Callable[Concatenate[Tensor, _P], _R]:
    """Run an operator on its tensors' device and in their precision.

    Kernels start on the current device, from where they may even reach another one's memory, but unordered with what runs
    there. Autocast would reach inside and round what is promised in the precision of the inputs.
    """

    @wraps(op)
    def run(q: Tensor, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        elsewhere = q.is_cuda and q.device.index != torch.cuda.current_device()
        place: AbstractContextManager[None] = torch.cuda.device(q.device) if elsewhere else nullcontext()
        with place, without_autocast(q.device):
            return op(q, *args, **kwargs)

    return run


@_guarded
def _forward(
    q: Tensor, k: Tensor, v: Tensor, config: str, scale: float, prompt_len: int, return_lse: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Select and attend; ``lse`` is empty unless asked for."""
    settings = _parse(config)
    if q.shape[1] == 0:
        return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], 0) if return_lse else 0, dtype=torch.float32)
    return _backend(q, settings.block_size, backend).forward(q, k, v, settings, scale, prompt_len, return_lse)


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, config: str, scale: float, prompt_len: int, return_lse: bool, backend: str
) -> tuple[Tensor, Tensor]:
    shape = (q.shape[0], q.shape[2], q.shape[1]) if return_lse else (0,)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(shape, dtype=torch.float32)


@_guarded
def _select(q: Tensor, k: Tensor, v: Tensor, config: str, scale: float, prompt_len: int, backend: str) -> tuple[Tensor, Tensor]:
    """Indices and counts of the blocks that a config keeps."""
    settings = _parse(config)
    selection = _backend(q, settings.block_size, backend).select(q, k, v, settings, scale, prompt_len)
    missing = _widest_row(settings, selection.first_row, selection.rows, prompt_len) - selection.indices.shape[3]
    indices = torch.nn.functional.pad(selection.indices, (0, missing), value=PAD) if missing else selection.indices
    return indices, selection.counts


def _widest_row(config: StemConfig, first_row: int, rows: int, prompt_len: int) -> int:
    """Width of a selection's lists. Rows may turn out shorter (``forced="extra"``), but compiled graphs rely on this."""
    return max(row_budgets(config, block_count(prompt_len, config.block_size))[first_row : first_row + rows], default=0)


def _fake_select(
    q: Tensor, k: Tensor, v: Tensor, config: str, scale: float, prompt_len: int, backend: str
) -> tuple[Tensor, Tensor]:
    settings = _parse(config)
    size = settings.block_size
    first, end = (k.shape[1] - q.shape[1]) // size, block_count(k.shape[1], size)
    if isinstance(prompt_len, int) and isinstance(end, int) and isinstance(first, int):
        rows = end - first if q.shape[1] else 0
        width = _widest_row(settings, first, rows, prompt_len)
    else:  # symbolic lengths: the widest row is known only when the call runs
        rows, width = end - first, torch.library.get_ctx().new_dynamic_size()
    shape = (q.shape[0], q.shape[2], rows)
    return q.new_empty((*shape, width), dtype=torch.int32), q.new_empty(shape, dtype=torch.int32)


@_guarded
def _attend(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, block_size: int, scale: float,
    return_lse: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention over given blocks."""
    selection = BlockSelection(indices, counts, block_size, q.shape[1], k.shape[1])
    if q.device.type == "cpu":  # on a GPU this would wait for the device; kernels guard their own reads
        selection.validate()
    return _backend(q, block_size, backend).attend(q, k, v, selection, scale, return_lse)


def _fake_attend(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, block_size: int, scale: float,
    return_lse: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]) if return_lse else 0, dtype=torch.float32)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse


@_guarded
def _forward_varlen(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Sequence[int], k_starts: Sequence[int], page_table: Tensor | None, config: str,
    scale: float, prompt_lens: Sequence[int], return_lse: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Select and attend in a packed batch."""
    settings = _parse(config)
    chosen = _backend(q, settings.block_size, backend)
    packing = Packing(q_starts, k_starts)
    return chosen.forward_varlen(q, k, v, packing, page_table, settings, scale, prompt_lens, return_lse)


def _fake_forward_varlen(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Sequence[int], k_starts: Sequence[int], page_table: Tensor | None, config: str,
    scale: float, prompt_lens: Sequence[int], return_lse: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lse = q.new_empty((q.shape[1], q.shape[0]) if return_lse else 0, dtype=torch.float32)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse


_SCHEMAS: dict[str, tuple[str, Callable[..., tuple[Tensor, Tensor]], Callable[..., tuple[Tensor, Tensor]]]] = {
    "forward": (
        "(Tensor q, Tensor k, Tensor v, str config, float scale, SymInt prompt_len, bool return_lse, str backend)",
        _forward,
        _fake_forward,
    ),
    "select": (
        "(Tensor q, Tensor k, Tensor v, str config, float scale, SymInt prompt_len, str backend)",
        _select,
        _fake_select,
    ),
    "attend": (
        "(Tensor q, Tensor k, Tensor v, Tensor indices, Tensor counts, SymInt block_size, float scale, bool return_lse,"
        " str backend)",
        _attend,
        _fake_attend,
    ),
    "forward_varlen": (
        "(Tensor q, Tensor k, Tensor v, SymInt[] q_starts, SymInt[] k_starts, Tensor? page_table, str config, float scale,"
        " SymInt[] prompt_lens, bool return_lse, str backend)",
        _forward_varlen,
        _fake_forward_varlen,
    ),
}

for _name, (_schema, _run, _fake) in _SCHEMAS.items():
    _qualified = f"stem_attention::{_name}"
    torch.library.define(_qualified, f"{_schema} -> (Tensor, Tensor)")
    torch.library.impl(_qualified, "CompositeExplicitAutograd", _run)
    torch.library.register_fake(_qualified, _fake)

forward = torch.ops.stem_attention.forward.default
select = torch.ops.stem_attention.select.default
attend = torch.ops.stem_attention.attend.default
forward_varlen = torch.ops.stem_attention.forward_varlen.default
