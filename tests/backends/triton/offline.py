"""Record what the library launches, and compile it for cards that this machine does not have."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from stem_attention import Mass, Policy, Stem
from stem_attention.backends.kept import nothing_kept
from stem_attention.backends.triton import TritonBackend, attention, backward, mass, packing, stem
from stem_attention.backends.triton.kept import pack
from stem_attention.backends.triton.launch import BackwardLaunch, Launch
from stem_attention.backends.triton.layout import Layout
from stem_attention.backends.triton.program import Launches
from stem_attention.call import Call, PackedBatch

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "sm120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that a block of threads may have. sm80's choices also serve the smaller sm86 and sm89.
SHARED_LIMIT = {"sm80": 99 << 10, "sm90": 227 << 10, "sm100": 227 << 10, "sm120": 99 << 10, "gfx942": 64 << 10}

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.float8_e4m3fn: "fp8e4nv",
}
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


def variants(names: Iterable[Any], *newest: Any) -> list[Any]:
    """Parameters of which some are compiled with the newest Triton too: one of each kernel, and what its other forms add."""
    return [pytest.param(name, marks=[pytest.mark.newest_triton] * (name in newest), id=str(name)) for name in names]


@dataclass(frozen=True)
class Recorded:
    """One launch: the kernel, its arguments by name, and the compiler's options."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]

    def changed(self, **arguments: Any) -> Recorded:
        """The same launch with other arguments."""
        return replace(self, arguments={**self.arguments, **arguments})

    def warmed(self) -> Any:
        """What Triton compiles for the launch on the card that its driver names."""
        return self.kernel.warmup(**self.arguments, **self.options, grid=(1,))


@dataclass(frozen=True)
class Compiled:
    """What the compilers say: bytes of shared memory, registers or bytes spilled to memory, and the assembly."""

    shared: int
    spills: int
    registers: int
    assembly: str


class Recorder(Launches):
    """Stands where kernels are started."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[Recorded] = []

    def start(self, kernel: Any, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
        options = {name: named.pop(name) for name in _OPTIONS if name in named}
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | named
        self.recorded.append(Recorded(kernel, {name: arguments[name] for name in kernel.arg_names}, options))


def record_selection(
    target: str, *, policy: Policy | None = None, length: int = 131071, dim: int = 128, dtype: torch.dtype = torch.bfloat16,
    ragged: bool = False, page: int = 0, implicit: bool = True, softcap: float | None = None,
    value_dim: int | None = None,
) -> dict[str, Recorded]:  # fmt: skip
    """Launches of a selection on a card, the last of each kernel by its name."""
    launches = Recorder()
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode():
        patch.setattr(stem, "architecture", lambda _: target)
        patch.setattr(mass, "architecture", lambda _: target)
        patch.setattr(torch.version, "hip", None if target.startswith("sm") else "7.0")
        patch.setattr(stem, "_budget_table", lambda *_: torch.empty((1, 9), dtype=torch.int32, device="cuda"))
        patch.setattr(mass, "to_device", lambda *_: torch.empty(1, dtype=torch.int32, device="cuda"))
        patch.setattr(mass, "_head_shares", lambda *_: torch.empty((1, 8), dtype=torch.float32, device="cuda"))
        call = _call(Mass() if policy is None else policy, length, dim, dtype, "cuda", ragged, page, value_dim)
        call = replace(call, softcap=softcap)
        selector = TritonBackend().selector(call.policy)
        assert selector is not None
        selector(call, Layout.of(call, call.policy.block_size, launches), 0, implicit, launches)
    return {launch.kernel.fn.__name__: launch for launch in launches.recorded}


def record_packing(dim: int, by_head: bool) -> Recorded:
    """The launch that brings an fp8 cache in pages of 16 to bf16."""
    launches, scale = Recorder(), torch.ones(2 if by_head else ())
    k = torch.empty((20, 16, 2, dim), dtype=torch.float8_e4m3fn)
    call = replace(_call(Mass(), 300, dim, torch.bfloat16, "cpu", True, 16, None), k=k, v=k, k_scale=scale, v_scale=scale)
    packing.packed(call, launches)
    return launches.recorded[0]


def record_attention(
    target: str, *, dim: int = 128, block_size: int = 128, dtype: torch.dtype = torch.bfloat16, ragged: bool = False,
    page: int = 0, lse: bool = True, launch: Launch | None = None, sinks: torch.dtype | None = None,
    softcap: float | None = None, value_dim: int | None = None, window: int | None = None,
) -> Recorded:  # fmt: skip
    """The launch of attention on a card, with the choice that the library makes for it unless another is given."""

    launches = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "architecture", lambda _: target)
        if launch is not None:
            patch.setattr(attention, "attention_launch", lambda *_, **__: launch)
        call = replace(_call(Stem(block_size=block_size), 300, dim, dtype, "cpu", ragged, page, value_dim), return_lse=lse)
        call = replace(call, sinks=None if sinks is None else torch.empty(8, dtype=sinks), softcap=softcap, window=window)
        indices = torch.zeros((1, 8, -(-300 // block_size), 3), dtype=torch.int32)
        counts = indices[..., 0].contiguous()
        attention.attend(call, Layout.of(call, block_size, launches), indices, counts, block_size, 2, launches)
    return launches.recorded[0]


def record_backward(
    target: str, *, dim: int = 128, block_size: int = 128, dtype: torch.dtype = torch.bfloat16, ragged: bool = False,
    launches: dict[str, BackwardLaunch] | None = None, softcap: float | None = None, value_dim: int | None = None,
) -> dict[str, Recorded]:  # fmt: skip
    """The launches of a gradient on a card, by kernel; of two of one kernel the last. Other choices may be given for it."""
    started = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward, "architecture", lambda _: target)
        if launches is not None:
            patch.setattr(backward, "backward_launch", lambda kernel, *_: launches[kernel])
        call = _call(Stem(block_size=block_size), 300, dim, dtype, "cpu", ragged, 0, value_dim)
        call = replace(call, softcap=softcap)
        kept = nothing_kept(call)
        out, lse = replace(call, return_lse=True).empty_results()
        indices = torch.zeros((1, 8, kept.shape[2], 3), dtype=torch.int32)
        pack(Layout.of(call, block_size, started), indices, indices[..., 0].contiguous(), block_size, kept, started)
        backward.backward(call, kept, (out, lse), (out, lse), started)
    return {launch.kernel.fn.__name__: launch for launch in started.recorded}


def _call(
    policy: Policy, length: int, dim: int, dtype: torch.dtype, device: str, ragged: bool, page: int, value_dim: int | None
) -> Call:
    """A call of 8 query and 2 key/value heads, packed or paged where asked for."""

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device=device)

    if not ragged and not page:
        k, v = (empty(1, length, 2, width) for width in (dim, value_dim or dim))
        return Call(empty(1, length, 8, dim), k, v, policy, 0.1, length)
    pages = length // page + 1 if page else 0
    table = empty(1, pages, kind=torch.int32) if page else None
    borders = empty(2, kind=torch.int32)
    batch = PackedBatch((0, length), (0, length), (length,), borders, borders, table)
    k, v = (empty(pages, page, 2, width) if page else empty(length, 2, width) for width in (dim, value_dim or dim))
    return Call(empty(length, 8, dim), k, v, policy, 0.1, batch=batch)


def _type(value: Any) -> str:
    """Triton's name of an argument's type; what never varies or is absent becomes a constant, as at run time."""
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "constexpr" if value is None else "i32"


def compile_for(target: str, launch: Recorded) -> Compiled:
    """Compile a recorded launch as Triton would on the card itself."""
    names = launch.kernel.arg_names
    fixed = {parameter.name for parameter in launch.kernel.params if parameter.is_constexpr}
    general = {parameter.name for parameter in launch.kernel.params if parameter.do_not_specialize}
    signature = {name: "constexpr" if name in fixed else _type(value) for name, value in launch.arguments.items()}
    constants = {(i,): launch.arguments[name] for i, name in enumerate(names) if signature[name] == "constexpr"}
    aligned = [
        i for i, name in enumerate(names)
        if signature[name].startswith("*")
        or (signature[name] == "i32" and name not in general and launch.arguments[name] % 16 == 0)
    ]  # fmt: skip
    source = ASTSource(launch.kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    compiled = triton.compile(source, target=TARGETS[target], options=launch.options)
    if TARGETS[target].backend == "cuda":
        registers, spills = resources(compiled.asm["cubin"])
        return Compiled(compiled.metadata.shared, spills, registers, compiled.asm["ptx"])
    assembly = compiled.asm["amdgcn"]
    # Scalar registers spill to lanes of vector registers, not to memory.
    spills, registers = (int(re.findall(rf"\.{name}:\s*(\d+)", assembly)[0]) for name in ("vgpr_spill_count", "vgpr_count"))
    return Compiled(compiled.metadata.shared, spills, registers, assembly)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and the bytes of memory that it uses in place of registers."""
    usage = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", dumped(cubin, "--dump-resource-usage"))}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def dumped(cubin: bytes, what: str) -> str:
    """What NVIDIA's tool tells of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, what, file.name], capture_output=True, check=True, text=True).stdout
