"""What tests of several policies look through."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """Inside, ``seen`` grows to the elements of the largest tensor that any operation makes."""

    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.seen = max(self.seen, out.numel())
        return out


@pytest.fixture
def largest() -> Largest:
    """To be entered around what is measured."""
    return Largest()
