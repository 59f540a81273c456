"""What the tests of trust share: where they run, and calls that fit there."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import stem_attention as sa
from stem_attention.testing import make_qkv, random_selection

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HEADS = (2, 1) if INTERPRETED else (4, 2)  # the interpreter takes milliseconds for each block of each head


@dataclass(frozen=True)
class Rig:
    """A backend, its device, and the block size, head dimension and dtype of its calls."""

    backend: str
    device: str = "cpu"
    block: int = 16
    dim: int = 16
    dtype: torch.dtype = torch.float32

    @property
    def obstacle(self) -> str | None:
        """Why it cannot run on this machine."""
        if self.device == "cpu":
            return None
        found = sa.explain(device="cuda", dtype=self.dtype, head_dim=self.dim, backend=self.backend)
        return None if found.chosen else found.reasons[self.backend]

    def config(self, **changes) -> sa.StemConfig:
        """Sparse at a few blocks."""
        fields = {"min_blocks": 3, "sink_blocks": 1, "local_blocks": 1, "tail_blocks": 1, "dense_below": 0, "stride": 8}
        return sa.StemConfig(block_size=self.block, **{**fields, **changes})

    def qkv(self, q_len: float, kv_len: float, batch: int = 1, heads=HEADS, **options) -> tuple[Tensor, Tensor, Tensor]:
        """Lengths in blocks."""
        lengths = round(q_len * self.block), round(kv_len * self.block)
        options = {"dtype": self.dtype, "device": self.device, **options}
        return make_qkv(batch, *lengths, *heads, self.dim, **options)

    def lists(self, q: Tensor, k: Tensor, density: float = 0.4, seed: int = 0) -> sa.BlockSelection:
        """A random selection for these tensors."""
        return random_selection(q.shape[0], q.shape[2], q.shape[1], k.shape[1], self.block, density, self.device, seed)

    def stem(self, q: Tensor, k: Tensor, v: Tensor, **options):
        """Select and attend; ``(out, lse)``."""
        options = {"config": self.config(), "return_lse": True, **options}
        return sa.stem_attention(q, k, v, backend=self.backend, **options)

    def select(self, q: Tensor, k: Tensor, v: Tensor, **options) -> sa.BlockSelection:
        """Select."""
        return sa.select_blocks(q, k, v, backend=self.backend, **{"config": self.config(), **options})

    def attend(self, q: Tensor, k: Tensor, v: Tensor, selection: sa.BlockSelection, **options):
        """Attend over lists; ``(out, lse)``."""
        return sa.block_sparse_attention(q, k, v, selection, backend=self.backend, **{"return_lse": True, **options})

    def packed(self, *args, **options):
        """A packed batch; ``(out, lse)``."""
        options = {"config": self.config(), "return_lse": True, **options}
        return sa.stem_attention_varlen(*args, backend=self.backend, **options)


def _on_gpu(*fields) -> object:
    return pytest.param(Rig(*fields), id=f"{fields[0]}-gpu", marks=pytest.mark.gpu)


RIGS = [pytest.param(Rig(name), id=name) for name in (("triton",) if INTERPRETED else ("torch", "reference"))]
if not INTERPRETED:
    RIGS += [_on_gpu("triton", "cuda", 64, 64, torch.bfloat16), _on_gpu("hopper", "cuda", 128, 128, torch.bfloat16)]


def equal(a, b) -> bool:
    """Bit for bit, and nothing is NaN."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
