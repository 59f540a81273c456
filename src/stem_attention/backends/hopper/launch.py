"""Parts of every launch of Hopper's kernels: descriptions of tensors for the copy engine, and registers at entry."""

from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Arguments of both attention kernels that differ from call to call: none gets a kernel of its own for 1 or multiples of 16.
VARYING = (
    "q_len", "kv_len", "sequences", "heads", "rows", "heavy", "light", "abreast", "width", "tickets", "group", "page_count",
    "table_stride", "lse_stride_b", "lse_stride_h",
)  # fmt: skip
_LAYOUT = gl.NVMMASharedLayout(128, 16, 4)


def tiles(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Describe ``(batch, tokens, heads, dim)`` in tiles of so many rows and columns of a head."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, 1, columns], _LAYOUT)


def compiler_options(warpgroups: int, programs: int) -> dict[str, int]:
    """Return the compiler's options with which ``programs`` fit a multiprocessor; one alone has all its registers.

    A program has so many warpgroups that compute, and one of which a warp copies.
    """
    return {"num_warps": 4} if programs == 1 else {"num_warps": 4, "maxnreg": entry_registers(warpgroups, programs)}


def entry_registers(warpgroups: int, programs: int) -> int:
    """Return the registers of a thread at entry with which so many programs fit."""
    return 65536 // (128 * (warpgroups + 1) * programs) // 8 * 8
