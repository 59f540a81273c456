"""Compile the kernels for cards that this machine does not have, and read what the compilers say about the result."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stem_attention.backends.triton.attention_kernel import attention_kernel
from stem_attention.backends.triton.choose_kernel import choose_kernel
from stem_attention.backends.triton.launch import Launch
from stem_attention.backends.triton.pool_kernels import pool_keys, pool_queries
from stem_attention.backends.triton.score_kernel import score_kernel

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "sm120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that one thread block may have.
SHARED_LIMIT = {"sm80": 163 << 10, "sm90": 227 << 10, "sm100": 227 << 10, "sm120": 99 << 10, "gfx942": 64 << 10}

_INT32_POINTERS = ("budgets", "counts", "cu_k", "cu_q", "indices", "page_table")
_FLOAT_POINTERS = ("lse", "scores", "value")
_FLOATS = ("beta", "scale")
# Strides between heads or sequences of small tensors, which are multiples of nothing.
_UNALIGNED = ("budget_stride", "lse_stride_b", "lse_stride_h", "table_stride")


@dataclass(frozen=True)
class Compiled:
    """What the compilers say about one kernel: bytes of shared memory, bytes or registers spilled, and its assembly."""

    shared: int
    spills: int
    registers: int
    assembly: str


@cache
def _tool(name: str) -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _type(name: str, pointers: dict[str, str]) -> str:
    if name in pointers:
        return pointers[name]
    if name in _INT32_POINTERS:
        return "*i32"
    if name in _FLOAT_POINTERS:
        return "*fp32"
    if name in _FLOATS:
        return "fp32"
    return "i64" if "stride" in name else "i32"


def compile_kernel(
    kernel: Any, target: str, pointers: dict[str, str], constants: dict[str, Any], *, warps: int, stages: int = 3
) -> Compiled:
    """Compile ``kernel`` with 64-bit strides that are multiples of 16, as those of q, k and v are.

    Args:
        kernel: A ``triton.jit`` function.
        target: One of :data:`TARGETS`.
        pointers: Types of those arguments that depend on the inputs.
        constants: Its compile-time arguments.
        warps: As launched.
        stages: As launched.
    """
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else _type(name, pointers) for name in names}
    aligned = [
        i for i, name in enumerate(names)
        if signature[name].startswith("*") or (signature[name] == "i64" and name not in _UNALIGNED)
    ]  # fmt: skip
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    compiled = triton.compile(source, target=TARGETS[target], options={"num_warps": warps, "num_stages": stages})
    if TARGETS[target].backend == "hip":
        assembly = compiled.asm["amdgcn"]
        spills = sum(int(n) for n in re.findall(r"\.(?:vgpr|sgpr)_spill_count:\s*(\d+)", assembly))
        return Compiled(compiled.metadata.shared, spills, int(re.findall(r"\.vgpr_count:\s*(\d+)", assembly)[0]), assembly)
    registers, spills = _resources(compiled.asm["cubin"])
    return Compiled(compiled.metadata.shared, spills, registers, compiled.asm["ptx"])


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of memory that it uses in place of registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_tool("cuobjdump"), "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    usage = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def compile_attention(
    target: str, launch: Launch, *, head_dim: int = 128, block_size: int = 128, dtype: str = "bf16", ragged: bool = False,
    page: int = 0, lse: bool = True,
) -> Compiled:  # fmt: skip
    """The attention kernel as ``attention.attend`` launches it."""
    padded = triton.next_power_of_2(head_dim)
    tma = launch.tma and page % launch.tile == 0
    keys = f"tensordesc<{dtype}[1, {launch.tile}, 1, {padded}]>" if tma else f"*{dtype}"
    pointers = {"q": f"*{dtype}", "out": f"*{dtype}", "k": keys, "v": keys}
    constants = {
        "G": 4, "B": block_size, "BN": launch.tile, "D": head_dim, "BD": padded, "PAGE": page, "RAGGED": ragged, "TMA": tma,
        "LSE": lse,
    }  # fmt: skip
    return compile_kernel(attention_kernel, target, pointers, constants, warps=launch.warps, stages=launch.stages)


def compile_pool_queries(
    target: str, *, head_dim: int = 128, block_size: int = 128, stride: int = 16, split: bool = True, ragged: bool = False
) -> Compiled:
    """The pooling of queries as ``select.select`` launches it."""
    constants = _pool_constants(head_dim, block_size, stride, split, ragged)
    return compile_kernel(pool_queries, target, _pool_pointers(split, "q"), constants, warps=2)


def compile_pool_keys(
    target: str, *, head_dim: int = 128, block_size: int = 128, stride: int = 16, split: bool = True, ragged: bool = False,
    norms: int = 1, page: int = 0,
) -> Compiled:  # fmt: skip
    """The pooling of keys and values as ``select.select`` launches it."""
    constants = _pool_constants(head_dim, block_size, stride, split, ragged) | {"NORMS": norms, "PAGE": page}
    return compile_kernel(pool_keys, target, _pool_pointers(split, "k", "v"), constants, warps=2)


def _pool_pointers(split: bool, *inputs: str) -> dict[str, str]:
    given, sums = ("*bf16", "*bf16") if split else ("*fp32", "*fp32")
    return {"high": sums, "low": sums} | dict.fromkeys(inputs, given)


def _pool_constants(head_dim: int, block_size: int, stride: int, split: bool, ragged: bool) -> dict[str, Any]:
    padded = triton.next_power_of_2(head_dim)
    return {"B": block_size, "S": stride, "D": head_dim, "BD": padded, "SPLIT": split, "RAGGED": ragged}


def compile_score(
    target: str, *, head_dim: int = 128, block_size: int = 128, stride: int = 16, ragged: bool = False
) -> Compiled:
    """The scores' product as ``select.select`` launches it for bf16 and fp16."""
    pointers = dict.fromkeys(("q_high", "q_low", "k_high", "k_low"), "*bf16")
    constants = {
        "B": block_size, "R": block_size // stride, "G": 4, "BM": 128, "BN": 128, "BK": 64, "WIDTH": stride * head_dim,
        "SPLIT": True, "RAGGED": ragged,
    }  # fmt: skip
    return compile_kernel(score_kernel, target, pointers, constants, warps=8)


def compile_choose(
    target: str, *, columns: int, extra: bool = False, implicit: bool = False, ragged: bool = False
) -> Compiled:
    """The choice of blocks as ``select.select`` launches it."""
    constants = {
        "B": 128, "SINK": 4, "LOCAL": 4, "EXTRA": extra, "IMPLICIT": implicit, "COLUMNS": columns, "RAGGED": ragged,
    }  # fmt: skip
    return compile_kernel(choose_kernel, target, {}, constants, warps=min(16, max(1, columns // 1024)))
