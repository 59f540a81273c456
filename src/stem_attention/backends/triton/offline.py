"""Compile what the library would launch, for a card that need not be there.

The host code runs as it is, on meta tensors, which have shapes and strides but no memory: Triton then compiles what it would
compile at run time and keeps it in the cache on disk under the same key. Nothing is started. What is left for the first launch
where there is no NVIDIA driver is a stub of C for every kernel, tenths of a second each.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes.util import find_library
from dataclasses import dataclass
from types import SimpleNamespace
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
    """One kernel, by name and by what Triton's cache on disk knows it by; ``cached`` where it was there already."""

    kernel: str
    key: str
    cached: bool
    seconds: float


def cache_directory() -> str:
    """Return where Triton keeps compiled kernels."""
    return str(knobs.cache.dir)


def _card(target: GPUTarget) -> SimpleNamespace:
    """Stand for the driver of a card: say what it is, and start nothing."""
    device = object()  # Triton keeps kernels in memory by device: a real card never meets these
    return SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: device,
        get_current_stream=lambda device: 0,
        get_active_torch_device=lambda: torch.device("meta"),
        launcher_cls=_launcher,
        utils=SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": _ANY_AMOUNT},
            load_binary=lambda *_: (1, 1, 0, 0, _ANY_AMOUNT),  # module, function, registers, spills, threads
        ),
    )


def _launcher(source: Any, metadata: Any) -> Callable[..., None]:
    # The C stub that hands a kernel its arguments is kept in the cache too, but it links to NVIDIA's driver.
    if knobs.nvidia.libcuda_path or find_library("cuda"):
        CudaLauncher(source, metadata)
    return lambda *_: None


@contextmanager
def offline(architecture: str, on_kernel: Callable[[Compilation], None]) -> Iterator[None]:
    """Make launches on meta tensors compile for a card, ``"sm90"`` and the like, and start nothing.

    ``on_kernel`` hears of every kernel when it is compiled or found in the cache. A card that is not of NVIDIA, or of a compute
    capability below 8.0, is a ValueError.
    """
    number = re.fullmatch(r"sm(\d+)", architecture)
    if number is None or int(number[1]) < 80:
        raise bad_argument("arch", "sm80, sm90, ...", repr(architecture), "name an NVIDIA architecture since Ampere")

    def listen(*, src: Any, metadata: dict[str, Any], times: Any, cache_hit: bool, **_: Any) -> None:
        on_kernel(Compilation(src.name, metadata["hash"], cache_hit, times.total / 1e6))

    driver.set_active(_card(GPUTarget("cuda", int(number[1]), 32)))
    try:
        with knobs.compilation.scope():
            knobs.compilation.listener = listen
            yield
    finally:
        driver.set_active(None)
