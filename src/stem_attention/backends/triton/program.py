"""Record what a call launches, and run the record for calls of the same form.

All layers of a model, and all prompts of one length, launch the same kernels with the same numbers: only addresses differ.
Working the numbers out, and letting Triton choose a compilation by them, costs the host some 0.2 ms a call; running the
recording costs a quarter of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stem_attention.backends.triton.starter import Encoder, is_tile, starter, tile_at
from stem_attention.call import Call

_ALIGNED = 256  # bytes: as far as torch's own allocations begin apart, or more
_WORKSPACE = 6  # the role of what only a call's own kernels use; inputs and outputs have those before
_MOST_BOUND = 256  # sets of addresses that a program remembers: more than a model has layers


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

    def forget(self) -> None:
        """Let go of everything: nothing will be made of it."""
        self._room, self._kept, self._started = [], [], []

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
            for at, x in enumerate(args):
                base = x if isinstance(x, Tensor) else getattr(x, "base", None)
                if base is None or base.numel() == 0:
                    continue
                place = places.get(base.data_ptr())
                if place is None:
                    if base.data_ptr() not in kept:
                        return None
                elif isinstance(x, Tensor):
                    template[at] = _Pointer(*place)
                else:
                    template[at] = _Tile(tile_at(x, 0), *place)  # a program outlives the tensors that it was recorded with
            steps.append(_Step(template, *starter(compiled, (*grid, 1, 1)[:3], stream)))
        return Program(steps, end, self._kept, lse.new_empty(0))


class _Pointer(NamedTuple):
    role: int
    offset: int  # bytes


class _Tile(NamedTuple):
    descriptor: Any
    role: int
    offset: int


@dataclass(frozen=True)
class _Step:
    """One launch: its arguments, places instead of addresses, and what :func:`starter` says of its kernel."""

    template: list[Any]
    start: Callable[..., None]
    encoders: Iterable[Encoder]

    def at(self, addresses: Sequence[int]) -> Callable[[], None]:
        """Return the launch for tensors at these addresses, by role."""
        args: list[Any] = []
        encoders = iter(self.encoders)
        for value in self.template:
            if isinstance(value, _Pointer):
                args.append(addresses[value.role] + value.offset)
            elif isinstance(value, _Tile):
                args += next(encoders)(tile_at(value.descriptor, addresses[value.role] + value.offset))
            elif is_tile(value):
                args += next(encoders)(value)
            else:
                args.append(value)
        return partial(self.start, *args)


class Program:
    """Launches with everything but addresses.

    Args:
        steps: The launches.
        workspace: Bytes of room that they need.
        kept: Tables that they read.
        no_lse: What is returned where the log-sum-exp is not wanted.
    """

    def __init__(self, steps: list[_Step], workspace: int, kept: list[Tensor], no_lse: Tensor) -> None:
        self._steps, self._workspace, self._kept, self._no_lse = steps, workspace, kept, no_lse
        self._bound: dict[tuple[int, ...], list[Callable[[], None]]] = {}

    def run(self, call: Call) -> tuple[Tensor, Tensor]:
        """Run for a call of the form that was recorded."""
        out = call.empty_out()
        lse = call.empty_lse() if call.return_lse else self._no_lse
        space = torch.empty(self._workspace, dtype=torch.uint8, device=call.q.device)
        sinks = self._no_lse if call.sinks is None else call.sinks
        # A layer's cache stays where it is, and torch gives freed room away again: most calls find the addresses of an
        # earlier one, and its encoded tensor descriptors.
        addresses = tuple([x.data_ptr() for x in (call.q, call.k, call.v, out, lse, sinks, space)])
        launches = self._bound.get(addresses)
        if launches is None:
            if len(self._bound) >= _MOST_BOUND:
                self._bound.clear()
            launches = self._bound[addresses] = [step.at(addresses) for step in self._steps]
        for launch in launches:
            launch()
        return out, lse


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
        at[2] % 16, out % 16, kept, at[0] == at[1], at[1] == at[2], at[0] == at[2], sink, call.softcap, call.window,
        call.policy, call.scale, call.prompt_len, call.return_lse,
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
