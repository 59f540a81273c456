"""Start a compiled kernel as Triton does, but for what is the same each time.

Triton tells profilers of every start, and encodes a kernel's tensor descriptors anew: for four descriptors that takes twice as
long as the start itself. Its own launcher stands behind both. Where that is found differs between releases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from inspect import getclosurevars, isfunction
from itertools import repeat
from typing import Any, TypeAlias

from torch import Tensor

Encoder: TypeAlias = Callable[[Any], list[Any]]


def starter(compiled: Any, grid: tuple[int, ...], stream: int) -> tuple[Callable[..., None], Iterable[Encoder]]:
    """Return what starts a compiled kernel, given its arguments, and for each tensor descriptor what turns it into arguments.

    Args:
        compiled: What ``kernel[grid](...)`` returned.
        grid: Three numbers of programs.
        stream: Handle of the stream.
    """
    run = compiled.run
    launch = getattr(run, "launch", None)
    behind = getclosurevars(launch).nonlocals if isfunction(launch) else {"launcher": launch, "tensordesc_meta": []}
    # Triton 3.6 on CUDA. Later launchers take their arguments packed, and the one for ROCm has none behind it.
    plain = type(run).__name__ == "CudaLauncher" and "tensordesc_meta" in behind and not hasattr(run, "arg_annotations")
    if not plain or run.global_scratch_size or run.profile_scratch_size:
        start = partial(run, *grid, stream, compiled.function, compiled.packed_metadata, None, None, None)
        return start, repeat(_as_it_is)
    from triton.backends.nvidia.driver import make_tensordesc_arg

    start = partial(
        behind["launcher"], *grid, stream, compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None,
        compiled.packed_metadata, None, None, None,
    )  # fmt: skip
    return start, [partial(make_tensordesc_arg, metadata=meta) for meta in behind["tensordesc_meta"]]


def _as_it_is(tile: Any) -> list[Any]:
    return [tile]


def is_tile(x: Any) -> bool:
    """Tell whether an argument of a kernel is a tensor descriptor."""
    return hasattr(x, "base") and not isinstance(x, Tensor)


def tile_at(tile: Any, address: int) -> Any:
    """Return a tensor descriptor for the same shape at another address, not checked again."""
    other = object.__new__(type(tile))
    other.__dict__.update(tile.__dict__, base=_Address(address))
    return other


class _Address:
    """All of a tensor that Triton asks for when it encodes a descriptor."""

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address
