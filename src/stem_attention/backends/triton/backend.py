"""The Triton backend: selection on the device, and attention right behind it, without waiting for either."""

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, TypeAlias

import torch
from torch import Tensor

from stem_attention.backends.base import Backend, Request, Results, qualified
from stem_attention.backends.kept import nothing_kept
from stem_attention.backends.triton.layout import Layout
from stem_attention.backends.triton.pieces import pieces
from stem_attention.backends.triton.program import Launches, Program, current_stream, form_of, repeatable
from stem_attention.call import Call
from stem_attention.errors import UnsupportedError
from stem_attention.policies.base import Policy
from stem_attention.policies.mass import Mass
from stem_attention.policies.stem import Stem
from stem_attention.selection import BlockSelection

HEAD_DIMS = range(16, 257, 8)
BLOCK_SIZES = (64, 128)
OLDEST_TRITON = (3, 6)

_MOST_SEQUENCES = 65535  # of the second and third dimension of a grid
_MOST_PROGRAMS = 1024
_NARROW = 32  # values of so few numbers

Selector: TypeAlias = Callable[[Call, Layout, int, bool, Launches], tuple[Tensor, Tensor]]
"""Takes a call, its layout, the prompt length under which sequences keep everything, whether rows that keep everything go
without a list, and what starts kernels; returns int32 indices ``(batch, q_heads, rows, width)`` and counts."""

AttentionKernel: TypeAlias = Callable[[Call, Layout, Tensor, Tensor, int, int, Launches], tuple[Tensor, Tensor]]
"""Takes a call, its layout, indices, counts, the block size, the rows at the end that are much longer than the rest, and what
starts kernels; returns ``(out, lse)``."""


@cache
def _too_old() -> str | None:
    """Tell Triton's version where it is too old: the kernels compile with 3.4 too, but spill registers, and no test runs it."""
    try:
        installed = version("triton")
    except PackageNotFoundError:  # ROCm's has another name
        return None
    return installed if tuple(map(int, installed.split(".")[:2])) < OLDEST_TRITON else None


class TritonBackend(Backend):
    """Selection and attention in portable Triton. Triton itself is imported at the first call."""

    name = "triton"
    # H200: at 8192 tokens the whole call beats cuDNN 1.56x (32/8/128), 1.56x (28/4/128), 1.74x (32/8/64), 1.03x (8/4/256).
    crossover = 8192
    head_dims: Collection[int] = HEAD_DIMS
    head_dims_said = "a multiple of 8 between 16 and 256"

    def __init__(self) -> None:
        self._programs: dict[tuple[Any, ...], Program] = {}

    def why_not(self, request: Request) -> str | None:
        """It takes bf16 and fp16, some head dimensions, blocks of 64 and 128, and cards by :meth:`card_obstacle`."""
        if find_spec("triton") is None:
            return "triton is not installed: pip install 'stem-attention[gpu]'"
        if request.device.type != "cuda":
            return f"it needs a GPU, not {request.device.type}"
        if (old := _too_old()) is not None:
            return f"it needs Triton 3.6 or newer, not {old}: update PyTorch, which brings it"
        if not torch.cuda.is_available():
            return "torch sees no GPU"
        if request.dtype not in (torch.bfloat16, torch.float16):
            return f"it computes bfloat16 and float16, not {request.dtype}"
        if (obstacle := self.card_obstacle(request.device)) is not None:
            return obstacle
        if request.head_dim not in self.head_dims:
            return f"head_dim must be {self.head_dims_said}, not {request.head_dim}"
        value_dim = request.head_dim if request.value_dim is None else request.value_dim
        if (obstacle := self.value_obstacle(request.head_dim, value_dim)) is not None:
            return obstacle
        if request.block_size not in BLOCK_SIZES:
            return f"block_size must be 64 or 128, not {request.block_size}"
        return None

    def value_obstacle(self, head_dim: int, value_dim: int) -> str | None:
        """Say why values of a dimension will not do beside such keys; None when they will."""
        if value_dim not in HEAD_DIMS:
            return f"value_dim must be {TritonBackend.head_dims_said}, not {value_dim}"
        # Triton 3.6 gave wrong rows of others on an H100 (docs/kernels-record.md).
        fits = value_dim > _NARROW or value_dim == head_dim
        return None if fits else f"value_dim must be head_dim, {head_dim}, or above {_NARROW}, not {value_dim}"

    def card_obstacle(self, device: torch.device) -> str | None:
        """Say why a GPU will not do; None when it will: cards since Ampere, or with ROCm."""
        fits = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
        return None if fits else "it needs compute capability 8.0 (Ampere) or newer"

    def kernel(self, call: Call) -> AttentionKernel:
        """Return what attends: here the portable kernel."""
        from stem_attention.backends.triton.attention import attend

        return attend

    def selector(self, policy: Policy) -> Selector | None:
        """Return the fast selection for a policy, or None where its own code selects, a sequence at a time."""
        if type(policy) is Mass:  # a subclass may choose as it likes
            from stem_attention.backends.triton.mass import select_by_mass

            return select_by_mass
        if type(policy) is Stem:
            from stem_attention.backends.triton.stem import select_by_score

            return select_by_score
        return None

    def path(self, policy: Policy) -> tuple[str, ...]:
        """Name the two launches behind :meth:`fused`, and their kernels; see :meth:`Backend.path`."""
        select = self.selector(policy)
        attends = f"{type(self).__module__.removesuffix('.backend')}.attention.attend"
        if select is None:
            computes = f"{qualified(type(policy).__call__)} and {attends}"
            return qualified(self.forward), f"{qualified(self.select)} and {qualified(self.attend)}", computes
        return qualified(self.fused), f"{qualified(select)} and {attends}", "kernels"

    def select(self, call: Call) -> BlockSelection:
        """Choose blocks on the device."""
        selector, size, launches = self.selector(call.policy), call.policy.block_size, Launches()
        if selector is None:
            return super().select(call)
        check_grid(call)
        indices, counts = selector(call, Layout.of(call, size, launches), 0, False, launches)
        return BlockSelection(indices, counts, size, call.q.shape[1], call.k.shape[1])

    def attend(self, call: Call, selection: BlockSelection) -> tuple[Tensor, Tensor]:
        """Run the attention kernel."""
        check_grid(call)
        # Kernels read lists one after the other: those of an expanded or sliced selection do not lie so.
        indices, counts, size = selection.indices.contiguous(), selection.counts.contiguous(), selection.block_size
        launches = Launches()
        return self.kernel(call)(call, Layout.of(call, size, launches), indices, counts, size, 0, launches)

    def runner(self, call: Call) -> Callable[[Call], tuple[Tensor, Tensor]]:
        """Return :meth:`fused` where kernels select, and the prompt is not too short; else :meth:`forward`."""
        policy, packed = call.policy, call.batch is not None
        # The z-score's statistics are taken per sequence: a packed batch runs one at a time.
        fused = type(policy) is Mass or (type(policy) is Stem and not (packed and policy.magnitude == "zscore"))
        return self.fused if fused and (packed or not self.runs_dense(call)) else self.forward

    def fused(self, call: Call) -> tuple[Tensor, Tensor]:
        """Select and attend back to back, a packed batch in one launch of each kernel. Returns as :meth:`forward`."""
        limit = self.dense_limit(call.dense_below)
        programs = self._programs if call.batch is None else call.batch.once("programs", dict)
        again = repeatable(call)
        stream = current_stream(call.q.device) if again else 0
        form = (id(self), limit, stream, *form_of(call)) if again else ()
        program = programs.get(form)
        if program is not None:
            return program.run(call)
        check_grid(call)
        selector = self.selector(call.policy)
        assert selector is not None  # or this would not be the runner
        parts, size, attend = pieces(call), call.policy.block_size, self.kernel(call)
        whole = call.empty_results() if len(parts) > 1 else None
        for part, queries in parts:
            launches = Launches()
            layout = Layout.of(part, size, launches)
            # Rows that keep everything never get a list, so that two dense tail rows do not widen all others.
            indices, counts = selector(part, layout, limit, True, launches)
            # The tail's rows are the prompt's last: a chunk before the end has none.
            has_tail = part.batch is not None or part.prompt_len == part.k.shape[1]
            out, lse = attend(part, layout, indices, counts, size, call.policy.tail_blocks if has_tail else 0, launches)
            if whole is not None:
                whole[0][queries] = out
                if call.return_lse:
                    whole[1][(slice(None), *queries)] = lse
        if whole is not None:
            return whole
        if again and (program := launches.program(call, stream, out, lse)) is not None:
            if len(programs) >= _MOST_PROGRAMS:
                programs.clear()
            programs[form] = program
        return out, lse

    def attend_kept(self, call: Call, selection: BlockSelection) -> tuple[Tensor, Tensor, Tensor]:
        """Run the attention kernel, and turn the lists into bits on the device."""
        check_grid(call)
        indices, counts, size = selection.indices.contiguous(), selection.counts.contiguous(), selection.block_size
        launches = Launches()
        layout = Layout.of(call, size, launches)
        return self._attend_kept(replace(call, return_lse=True), layout, indices, counts, 0, launches)

    def forward_kept(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """Select and attend back to back as :meth:`fused` does. Nothing is recorded: a step's other work hides the host's."""
        call = replace(call, return_lse=True)
        parts = pieces(call)
        if self.runner(call) != self.fused or (call.batch is not None and len(parts) > 1):
            return super().forward_kept(call)
        check_grid(call)
        size, limit, selector = call.policy.block_size, self.dense_limit(call.dense_below), self.selector(call.policy)
        assert selector is not None  # or another method would be the runner
        out, lse = call.empty_results()
        kept = nothing_kept(call)
        for part, queries in parts:
            launches = Launches()
            layout = Layout.of(part, size, launches)
            indices, counts = selector(part, layout, limit, True, launches)
            found = self._attend_kept(part, layout, indices, counts, call.policy.tail_blocks, launches)
            if len(parts) == 1:
                return found
            row, (_, _, rows, words) = part.grid.first_row - call.grid.first_row, found[2].shape
            out[queries], lse[(slice(None), *queries)] = found[:2]
            kept[:, :, row : row + rows, :words] = found[2]
        return out, lse, kept

    def _attend_kept(
        self, call: Call, layout: Layout, indices: Tensor, counts: Tensor, heavy: int, launches: Launches
    ) -> tuple[Tensor, Tensor, Tensor]:
        from stem_attention.backends.triton.kept import pack

        size = call.policy.block_size
        out, lse = self.kernel(call)(call, layout, indices, counts, size, heavy, launches)
        kept = nothing_kept(call)
        pack(layout, indices, counts, size, kept, launches)
        return out, lse, kept

    def backward(self, call: Call, kept: Tensor, results: Results, d_results: Results) -> tuple[Tensor, Tensor, Tensor]:
        """Run the gradient's kernels, a packed batch in one launch of each."""
        from stem_attention.backends.triton.backward import backward

        check_grid(call)
        return backward(call, kept, results, d_results, Launches())


def check_grid(call: Call) -> None:
    """Refuse more sequences than a launch takes."""
    sequences = call.q.shape[0] if call.batch is None else call.batch.sequences
    if sequences > _MOST_SEQUENCES:
        raise UnsupportedError(f"a GPU's grid takes {_MOST_SEQUENCES} sequences, not {sequences}; split the batch")
