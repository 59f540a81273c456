"""Record what a call launches, and run the record for calls of the same form.

All layers of a model, and all prompts of one length, launch the same kernels with the same numbers: only addresses differ.
Working the numbers out, and letting Triton choose a compilation by them, costs the host some 0.2 ms a call; running the
recording costs a quarter of that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from stem_attention.call import Call

_ALIGNED = 256  # bytes: as far as torch's own allocations begin apart, or more
_WORKSPACE = 6  # the role of what only a call's own kernels use; inputs and outputs have those before


class Launches:
    """Make room and start kernels, and remember both."""

    def __init__(self) -> None:
        self._room: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._started: list[tuple[Any, Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Make room that only the kernels of this call use."""
        self._room.append(torch.empty(shape, dtype=dtype, device=device))
        return self._room[-1]

    def keep(self, *tables: Tensor | None) -> None:
        """Name tensors that are the same for every call of this form."""
        self._kept += [table for table in tables if table is not None]

    def start(self, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        """Start ``kernel[grid](*args, **constants)``: a kernel's constants come last, and the compiler's options with them."""
        self._started.append((kernel, kernel[grid](*args, **constants), grid, args, constants))

    def program(self, call: Call, stream: int, out: Tensor, lse: Tensor) -> Program | None:
        """Turn what was started for a call into a program for others like it, on the same stream.

        None where something was started that does not run on a GPU, or that read a tensor from nobody knows where.
        """
        places, end = {}, 0
        for x in filter(Tensor.numel, self._room):
            places[x.data_ptr()] = _WORKSPACE, end
            end += -(-x.numel() * x.element_size() // _ALIGNED) * _ALIGNED
        # Of two inputs at one address the first stands for both: calls of one form agree in which coincide.
        given = (call.q, call.k, call.v, out, lse, call.sinks)
        for role, tensor in reversed(list(enumerate(given))):
            if tensor is not None and tensor.numel():
                places[tensor.data_ptr()] = (role, 0)
        kept = {x.data_ptr() for x in self._kept}
        steps: list[_Step] = []
        for kernel, compiled, grid, args, constants in self._started:
            if compiled is None or not hasattr(compiled, "packed_metadata"):
                return None
            template: list[Any] = [*args, *(constants[name] for name in kernel.arg_names[len(args) :])]
            pointers, tiles = [], []
            for at, x in enumerate(args):
                base = x if isinstance(x, Tensor) else getattr(x, "base", None)
                if base is None or base.numel() == 0:
                    continue
                place = places.get(base.data_ptr())
                if place is None:
                    if base.data_ptr() not in kept:
                        return None
                elif isinstance(x, Tensor):
                    pointers.append((at, *place))
                    template[at] = None  # a program outlives the tensors that it was recorded with
                else:
                    tiles.append((at, place[0]))
                    template[at] = _with_base(x, None)
            # As Triton starts kernels, but for what it would tell profilers, which takes as long as the launch.
            start = partial(
                compiled.run, *(*grid, 1, 1)[:3], stream, compiled.function, compiled.packed_metadata, None, None, None
            )
            steps.append((start, template, pointers, tiles))
        return Program(steps, end, self._kept, lse.new_empty(0))


# One launch: what starts it, its arguments, and which of them are addresses (argument, role, bytes behind it) and which
# descriptors (argument, role).
_Step: TypeAlias = tuple[Callable[..., None], list[Any], list[tuple[int, int, int]], list[tuple[int, int]]]


@dataclass(frozen=True)
class Program:
    """Launches with everything but addresses."""

    steps: list[_Step]
    workspace: int  # bytes of room that they need
    kept: list[Tensor]  # tables that they read
    no_lse: Tensor  # what is returned where the log-sum-exp is not wanted

    def run(self, call: Call) -> tuple[Tensor, Tensor]:
        """Run for a call of the form that was recorded."""
        out = call.out
        if out is None:
            out = torch.empty((*call.q.shape[:-1], call.v.shape[-1]), dtype=call.q.dtype, device=call.q.device)
        lse = call.empty_lse() if call.return_lse else self.no_lse
        space = torch.empty(self.workspace, dtype=torch.uint8, device=call.q.device)
        tensors = (call.q, call.k, call.v, out, lse, call.sinks, space)
        addresses = [0 if x is None else x.data_ptr() for x in tensors]
        for start, template, pointers, tiles in self.steps:
            args = template.copy()
            for at, role, offset in pointers:
                args[at] = addresses[role] + offset
            for at, role in tiles:
                args[at] = _with_base(args[at], tensors[role])
            start(*args)
        return out, lse


def _with_base(tile: Any, base: Tensor | None) -> Any:
    """A tensor descriptor with another base, not checked again."""
    other = object.__new__(type(tile))
    other.__dict__.update(tile.__dict__, base=base)
    return other


def form_of(call: Call) -> tuple[Any, ...]:
    """Return what calls on one stream must have in common to launch the same, beside their batch.

    Kernels are compiled for the alignment of addresses, and what two tensors share at one address they may share at another.
    """
    q, k, v, sinks = call.q, call.k, call.v, call.sinks
    at = q.data_ptr(), k.data_ptr(), v.data_ptr()
    out, kept = (0 if x is None else x.data_ptr() for x in (call.out, call.kept))
    sink = None if sinks is None else (sinks.dtype, sinks.data_ptr() % 16, *(sinks.data_ptr() == other for other in at))
    return (
        q.shape, q.stride(), k.shape, k.stride(), v.shape[-1], v.stride(), q.dtype, q.device, at[0] % 16, at[1] % 16,
        at[2] % 16, out % 16, kept, at[0] == at[1], at[1] == at[2], at[0] == at[2], sink, call.softcap, call.policy,
        call.scale, call.prompt_len, call.return_lse,
    )  # fmt: skip


def repeatable(call: Call) -> bool:
    """Tell whether launches may be recorded and run again: on a GPU, with no profiler that Triton tells of every launch.

    A graph of CUDA that is being captured would go on reading tables that a program may give away.
    """
    if not call.q.is_cuda or torch.cuda.is_current_stream_capturing():
        return False
    runtime, _ = _triton()
    hooks = runtime.launch_enter_hook, runtime.launch_exit_hook
    return not any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


def current_stream(device: torch.device) -> int:
    """Return the handle of a GPU's current stream; torch's own way there takes as long as a launch."""
    handle: int = _triton()[1].get_current_stream(device.index)
    return handle


@cache
def _triton() -> tuple[Any, Any]:
    """Triton's settings for launches, and its driver. Triton is imported at the first call."""
    from triton import knobs
    from triton.runtime import driver

    return knobs.runtime, driver.active
