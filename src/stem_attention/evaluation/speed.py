"""Dense against sparse attention on random inputs: first the check, then the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from stem_attention.api import block_sparse_attention, select_blocks
from stem_attention.backends.reference import ReferenceBackend
from stem_attention.config import StemConfig
from stem_attention.selection import BlockSelection
from stem_attention.testing import error_against_sdpa

_T = TypeVar("_T")

_CHECKED_ROWS = 3
# FlashAttention's own bound: at most twice what the same-precision dense attention loses against fp64. The floor is for
# inputs on which that happens to lose next to nothing.
_ERROR_FACTOR = 2.0
# Near ties may fall either way in fp32; of random inputs' blocks hardly any are that near.
_DIFFERENT_BLOCKS = 0.01


@dataclass(frozen=True)
class Shape:
    """One attention problem, batch 1."""

    length: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Check:
    """What a few query blocks, computed again, say.

    Attributes:
        rows: Query blocks compared.
        error: Worst relative row error of Stem against fp64.
        dense_error: The same for torch's masked SDPA on the same blocks.
        different_blocks: Share of the kept blocks that the fp64 reference does not keep.
    """

    rows: int
    error: float
    dense_error: float
    different_blocks: float

    def problem(self, dtype: torch.dtype) -> str | None:
        """Why the result is not to be trusted, or None."""
        allowed = max(_ERROR_FACTOR * self.dense_error, torch.finfo(dtype).eps)
        if not self.error <= allowed:
            return f"error {self.error:.2e} against fp64, allowed {allowed:.2e}"
        if not self.different_blocks <= _DIFFERENT_BLOCKS:
            share, allowed_share = f"{self.different_blocks:.1%}", f"{_DIFFERENT_BLOCKS:.1%}"
            return f"{share} of the kept blocks differ from the fp64 reference, allowed {allowed_share}"
        return None


@dataclass(frozen=True)
class Timing:
    """Seconds of every repeat, and the density that was run."""

    dense: list[float]
    selection: list[float]
    attention: list[float]
    density: float

    @property
    def dense_median(self) -> float:
        """Median of dense attention."""
        return statistics.median(self.dense)

    @property
    def selection_median(self) -> float:
        """Median of the selection alone."""
        return statistics.median(self.selection)

    @property
    def attention_median(self) -> float:
        """Median of the sparse attention alone."""
        return statistics.median(self.attention)

    @property
    def sparse_median(self) -> float:
        """Median of selection and attention together."""
        return statistics.median(a + b for a, b in zip(self.selection, self.attention, strict=True))

    @property
    def ratio(self) -> float:
        """How many times faster Stem is."""
        return self.dense_median / self.sparse_median

    @property
    def selection_share(self) -> float:
        """Selection over selection and attention, of the medians."""
        return self.selection_median / self.sparse_median


def random_inputs(shape: Shape, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q, k and v, ``(1, length, heads, dim)``, the same for the same seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(1, shape.length, heads, shape.head_dim) for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
    q, k, v = (torch.randn(size, generator=generator).to(shape.device, shape.dtype) for size in sizes)
    return q, k, v


def check(q: Tensor, k: Tensor, v: Tensor, config: StemConfig, seed: int = 0) -> Check:
    """Compute the last and a few random query blocks again in fp64, selection and attention."""
    selection = select_blocks(q, k, v, config=config)
    out = block_sparse_attention(q, k, v, selection)
    inner = torch.randint(selection.rows, (_CHECKED_ROWS - 1,), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = sorted({*inner, selection.rows - 1})
    errors = [_row_errors(q, k, v, out, selection, row) for row in rows]
    # The z-score looks at the values of the whole prompt, which only the last block's slice holds.
    comparable = rows[-1:] if config.magnitude == "zscore" else rows
    differences = [_row_difference(q, k, v, selection, row, config) for row in comparable]
    return Check(len(rows), max(e for e, _ in errors), max(d for _, d in errors), max(differences))


def _slice(selection: BlockSelection, row: int, length: int) -> tuple[slice, slice]:
    """Queries of a block, and the keys up to its end."""
    end = min((row + 1) * selection.block_size, length)
    return slice(row * selection.block_size, end), slice(0, end)


def _row_errors(q: Tensor, k: Tensor, v: Tensor, out: Tensor, selection: BlockSelection, row: int) -> tuple[float, float]:
    queries, keys = _slice(selection, row, k.shape[1])
    blocks = selection.to_mask()[:, :, row : row + 1].repeat_interleave(selection.block_size, 3)[..., keys]
    positions = torch.arange(keys.stop, device=q.device)
    mask = blocks & (positions <= positions[queries, None])
    return error_against_sdpa(out[:, queries], q[:, queries], k[:, keys], v[:, keys], mask)


def _row_difference(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, row: int, config: StemConfig) -> float:
    queries, keys = _slice(selection, row, k.shape[1])
    scale = q.shape[3] ** -0.5
    reference = ReferenceBackend().select(
        q[:, queries].double(), k[:, keys].double(), v[:, keys].double(), config, scale, k.shape[1]
    )
    kept, wanted = selection.to_mask()[:, :, row, : row + 1], reference.to_mask()[:, :, 0]
    return int((kept & ~wanted).sum()) / int(kept.sum())


def time_attention(q: Tensor, k: Tensor, v: Tensor, config: StemConfig, repeats: int, on_repeat: Callable[[], None]) -> Timing:
    """Time dense, selection and sparse attention in turn, ``repeats`` times, after one untimed round."""
    timing = Timing([], [], [], select_blocks(q, k, v, config=config).density())
    for repeat in range(repeats + 1):
        dense, _ = _timed(q.device, lambda: dense_attention(q, k, v))
        selecting, selection = _timed(q.device, lambda: select_blocks(q, k, v, config=config))
        attending, _ = _timed(q.device, partial(block_sparse_attention, q, k, v, selection))
        if repeat:
            timing.dense.append(dense)
            timing.selection.append(selecting)
            timing.attention.append(attending)
        on_repeat()
    return timing


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's causal ``scaled_dot_product_attention``, grouped heads as it takes them itself."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out: Tensor = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out


def _timed(device: torch.device, call: Callable[[], _T]) -> tuple[float, _T]:
    _wait(device)
    start = time.perf_counter()
    result = call()
    _wait(device)
    return time.perf_counter() - start, result


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
