"""Compile what the library would launch, for a card that need not be there.

The host code runs as it is, on meta tensors, which have shapes and strides but no memory: Triton then compiles what it would
compile at run time and keeps it in the cache on disk under the same key. Nothing is started. What is left for the first launch
where there is no NVIDIA driver is a stub of C for every kernel, tenths of a second each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes.util import find_library
from dataclasses import dataclass
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime import driver

from stem_attention.errors import bad_argument

_ANY_AMOUNT = 1 << 30


@dataclass(frozen=True)
class Compilation:
    """One kernel.

    Attributes:
        kernel: Its name.
        key: What Triton's cache on disk knows it by.
        cached: Whether it was there already.
        seconds: What it took.
    """

    kernel: str
    key: str
    cached: bool
    seconds: float


def cache_directory() -> str:
    """Where Triton keeps compiled kernels."""
    return str(knobs.cache.dir)


class _Card:
    """Stands for the driver of a card: says what it is, and starts nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> _Card:
        return self  # Triton keeps kernels in memory by device: a real card never meets these

    def get_current_stream(self, device: _Card) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_device_properties(self, device: _Card) -> dict[str, int]:
        return {"max_shared_mem": _ANY_AMOUNT}

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, _ANY_AMOUNT  # module, function, registers, spills, threads

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        # The C stub that hands a kernel its arguments is kept in the cache too, but it links to NVIDIA's driver.
        if knobs.nvidia.libcuda_path or find_library("cuda"):
            CudaLauncher(source, metadata)
        return lambda *_: None


@contextmanager
def offline(architecture: str, on_kernel: Callable[[Compilation], None]) -> Iterator[None]:
    """Inside, launches on meta tensors compile for a card and start nothing.

    Args:
        architecture: ``"sm90"`` and the like.
        on_kernel: Called for every kernel when it is compiled or found in the cache.

    Raises:
        ValueError: It is no NVIDIA architecture of compute capability 8.0 or later.
    """
    number = re.fullmatch(r"sm(\d+)", architecture)
    if number is None or int(number[1]) < 80:
        raise bad_argument("arch", "sm80, sm90, ...", repr(architecture), "name an NVIDIA architecture since Ampere")

    def listen(*, src: Any, metadata: dict[str, Any], times: Any, cache_hit: bool, **_: Any) -> None:
        on_kernel(Compilation(src.name, metadata["hash"], cache_hit, times.total / 1e6))

    driver.set_active(_Card(GPUTarget("cuda", int(number[1]), 32)))
    try:
        with knobs.compilation.scope():
            knobs.compilation.listener = listen
            yield
    finally:
        driver.set_active(None)
