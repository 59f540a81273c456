"""What the launches of Hopper's kernels share: descriptions of tensors for the copy engine, and registers at entry."""

from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_LAYOUT = gl.NVMMASharedLayout(128, 16, 4)


def tiles(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Describe ``(batch, tokens, heads, dim)`` in tiles of so many rows and columns of a head."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, 1, columns], _LAYOUT)


def entry_registers(warpgroups: int, programs: int) -> int:
    """Return the registers of a thread at entry with which ``programs`` fit a multiprocessor.

    A program has so many warpgroups that compute, and one of which a warp copies.
    """
    return 65536 // (128 * (warpgroups + 1) * programs) // 8 * 8
