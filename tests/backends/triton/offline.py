"""Record what the library launches, and compile it for cards that this machine does not have."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
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

from stem_attention import StemConfig
from stem_attention.backends.ragged import Ragged
from stem_attention.backends.triton import attention, choose, masses, routes, select
from stem_attention.backends.triton.launch import Launch, launch_for, mass_launch_for, score_launch_for

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "sm120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that a block of threads may have. sm80's choices also serve the smaller sm86 and sm89.
SHARED_LIMIT = {"sm80": 99 << 10, "sm90": 227 << 10, "sm100": 227 << 10, "sm120": 99 << 10, "gfx942": 64 << 10}

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}
_OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Recorded:
    """One launch: the kernel, its arguments by name, and the compiler's options."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]

    def changed(self, **arguments: Any) -> Recorded:
        """The same launch with other arguments."""
        return replace(self, arguments={**self.arguments, **arguments})


@dataclass(frozen=True)
class Compiled:
    """What the compilers say: bytes of shared memory, registers or bytes spilled to memory, and the assembly."""

    shared: int
    spills: int
    registers: int
    assembly: str


class _Recorder:
    """Stands where a kernel is launched."""

    def __init__(self, kernel: Any, launches: list[Recorded]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._record

    def _record(self, *args: Any, **named: Any) -> None:
        options = {name: named.pop(name) for name in _OPTIONS if name in named}
        arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | named
        self.launches.append(Recorded(self.kernel, {name: arguments[name] for name in self.kernel.arg_names}, options))


def record_selection(
    target: str, *, config: StemConfig | None = None, length: int = 131071, dim: int = 128, dtype: torch.dtype = torch.bfloat16,
    ragged: bool = False, page: int = 0, implicit: bool = True,
) -> dict[str, Recorded]:  # fmt: skip
    """Launches of a selection on a card, the last of each kernel by its name."""
    launches: list[Recorded] = []
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode():
        for module, name in (
            (routes, "pool_keys"), (routes, "pool_queries"), (routes, "score_kernel"), (choose, "choose_kernel"),
            (masses, "pool_key_means"), (masses, "pool_query_means"), (masses, "keep_kernel"),
        ):  # fmt: skip
            patch.setattr(module, name, _Recorder(getattr(module, name), launches))
        patch.setattr(routes, "score_launch", lambda _: score_launch_for(target))
        patch.setattr(masses, "mass_launch", lambda _: mass_launch_for(target))
        patch.setattr(torch.version, "hip", None if target.startswith("sm") else "7.0")
        for table in ("_budget_table", "_prompt_table"):
            patch.setattr(select, table, lambda *_: torch.empty((1, 9), dtype=torch.int32, device="cuda"))
        patch.setattr(masses, "_head_shares", lambda *_: torch.empty((1, 8), dtype=torch.float32, device="cuda"))
        q, k, borders, table = _inputs(length, dim, dtype, "cuda", ragged, page)
        chosen = StemConfig() if config is None else config
        select.select(q, k, k, chosen, 0.1, (length,), implicit=implicit, ragged=borders, page_table=table)
    return {launch.kernel.fn.__name__: launch for launch in launches}


def record_attention(
    target: str, *, dim: int = 128, block_size: int = 128, dtype: torch.dtype = torch.bfloat16, ragged: bool = False,
    page: int = 0, lse: bool = True, launch: Launch | None = None,
) -> Recorded:  # fmt: skip
    """The launch of attention on a card, with the choice that the library makes for it unless another is given."""

    def choose(_: torch.device, *asked: Any) -> Launch:
        return launch_for(target, *asked) if launch is None else launch

    launches: list[Recorded] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "attention_kernel", _Recorder(attention.attention_kernel, launches))
        patch.setattr(attention, "attention_launch", choose)
        patch.setattr(attention, "has_tma", lambda _: target.startswith("sm") and int(target[2:]) >= 90)
        q, k, borders, table = _inputs(300, dim, dtype, "cpu", ragged, page)
        rows = -(-300 // block_size)
        indices = torch.zeros((1, q.shape[-2], rows, 3), dtype=torch.int32)
        attention.attend(
            q, k, k, indices, indices[..., 0].contiguous(), block_size, 0.1, return_lse=lse, heavy=2, ragged=borders,
            page_table=table,
        )  # fmt: skip
    return launches[0]


def _inputs(
    length: int, dim: int, dtype: torch.dtype, device: str, ragged: bool, page: int
) -> tuple[Tensor, Tensor, Ragged | None, Tensor | None]:
    """Queries and keys of 8 and 2 heads; borders and page table where asked for. A fake tensor cannot be indexed."""

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device=device)

    if not ragged and not page:
        return empty(1, length, 8, dim), empty(1, length, 2, dim), None, None
    borders = empty(2, kind=torch.int32)
    packing = Ragged(borders, borders, length, length)
    if not page:
        return empty(length, 8, dim), empty(length, 2, dim), packing, None
    pages = length // page + 1
    return empty(length, 8, dim), empty(pages, page, 2, dim), packing, empty(1, pages, kind=torch.int32)


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
        registers, spills = _resources(compiled.asm["cubin"])
        return Compiled(compiled.metadata.shared, spills, registers, compiled.asm["ptx"])
    assembly = compiled.asm["amdgcn"]
    # Scalar registers spill to lanes of vector registers, not to memory.
    spills, registers = (int(re.findall(rf"\.{name}:\s*(\d+)", assembly)[0]) for name in ("vgpr_spill_count", "vgpr_count"))
    return Compiled(compiled.metadata.shared, spills, registers, assembly)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and the bytes of memory that it uses in place of registers."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    usage = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]
