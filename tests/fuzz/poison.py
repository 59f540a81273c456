"""Numbers that must not be read, put where a careless kernel would read them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

# Elements before and after each row, so that rows stay 16-byte aligned; and heads and positions around the tensor.
_ROW, _AROUND = 8, 3


@contextmanager
def new_memory_is_nan() -> Iterator[None]:
    """``torch.empty`` gives NaN, and the largest integer of its kind, so that a number which nobody writes shows."""
    settings: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        settings.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = before[2]
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def surrounded(x: Tensor, by: float = math.nan) -> Tensor:
    """The same numbers as a view into a larger tensor, which holds ``by`` before and after every row, head and sequence."""
    *outer, heads, dim = x.shape
    store = x.new_full((*(n + 2 * _AROUND for n in outer), heads + 2 * _AROUND, dim + 2 * _ROW), by)
    for axis, size in enumerate(x.shape):
        store = store.narrow(axis, _ROW if axis == x.dim() - 1 else _AROUND, size)
    return store.copy_(x)


@contextmanager
def undisturbed(*tensors: Tensor, poisoned: bool = True) -> Iterator[None]:
    """Around a call of the library: what it is given must come back as it was. New memory is NaN meanwhile, if poisoned."""
    before = [x.clone() for x in tensors]
    with new_memory_is_nan() if poisoned else nullcontext():
        yield
    assert all(torch.equal(x, y) for x, y in zip(before, tensors, strict=True)), "an input was written to"
