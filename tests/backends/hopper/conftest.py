"""A Hopper card that is not there, for which Triton compiles what the tests of this folder launch."""

from __future__ import annotations

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from stem_attention.backends.hopper import attention


class _Hopper:
    """Stands for its driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@pytest.fixture(autouse=True)
def _card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_active", _Hopper())
    monkeypatch.setattr(attention, "multiprocessors", lambda _: 132)
