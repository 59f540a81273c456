"""Where the tests of promises run: each backend, its device, and calls that fit there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import stem_attention as sa
from stem_attention.testing import make_qkv, random_selection

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HEADS = (2, 1) if INTERPRETED else (4, 2)  # the interpreter takes milliseconds for each block of each head


@dataclass(frozen=True)
class Rig:
    """A backend, its device, the block size, head dimension and dtype of its calls, and which rule chooses blocks."""

    backend: str
    device: str = "cpu"
    block: int = 16
    dim: int = 16
    dtype: torch.dtype = torch.float32
    by_mass: bool = False

    @property
    def obstacle(self) -> str | None:
        """Why it cannot run on this machine."""
        if self.device == "cpu":
            return None
        found = sa.explain(device="cuda", dtype=self.dtype, head_dim=self.dim, policy=self.policy, backend=self.backend)
        return None if found.chosen else found.reasons[self.backend]

    @property
    def policy(self) -> sa.Policy:
        """What chooses blocks unless a test says otherwise."""
        return self.mass() if self.by_mass else self.stem()

    def stem(self, **changes) -> sa.Stem:
        """Sparse at a few blocks."""
        fields = {"min_blocks": 3, "sink_blocks": 1, "local_blocks": 1, "tail_blocks": 1, "stride": 8}
        return sa.Stem(block_size=self.block, **{**fields, **changes})

    def mass(self, **changes) -> sa.Mass:
        """Sparse at a few blocks, and unlike in each head and row."""
        fields = {"share": 2.0, "query_pool": 4, "key_pool": 8, "local_blocks": 1, "tail_blocks": 1}
        return sa.Mass(block_size=self.block, **{**fields, **changes})

    def qkv(self, q_len: float, kv_len: float, batch: int = 1, heads=HEADS, **options) -> tuple[Tensor, Tensor, Tensor]:
        """Lengths in blocks."""
        lengths = round(q_len * self.block), round(kv_len * self.block)
        options = {"dtype": self.dtype, "device": self.device, **options}
        return make_qkv(batch, *lengths, *heads, self.dim, **options)

    def lists(self, q: Tensor, k: Tensor, density: float = 0.4, seed: int = 0) -> sa.BlockSelection:
        """A random selection for these tensors."""
        return random_selection(q.shape[0], q.shape[2], q.shape[1], k.shape[1], self.block, density, self.device, seed)

    def whole(self, q: Tensor, k: Tensor, v: Tensor, **options):
        """Select and attend, sparse from the first token on; ``(out, lse)``."""
        return sa.stem_attention(q, k, v, **self._options(**{"dense_below": 0, "return_lse": True, **options}))

    def select(self, q: Tensor, k: Tensor, v: Tensor, **options) -> sa.BlockSelection:
        """Select."""
        return sa.select_blocks(q, k, v, **self._options(**options))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, selection: sa.BlockSelection, **options):
        """Attend over lists; ``(out, lse)``."""
        return sa.block_sparse_attention(q, k, v, selection, backend=self.backend, **{"return_lse": True, **options})

    def packed(self, **arguments):
        """Run a packed batch as ``testing.pack`` makes it, sparse from the first token on; ``(out, lse)``."""
        return sa.stem_attention_varlen(**self._options(**{"dense_below": 0, "return_lse": True, **arguments}))

    def _options(self, **given) -> dict:
        return {"policy": self.policy, "backend": self.backend, **given}


ON_GPU = [Rig("triton", "cuda", 64, 64, torch.bfloat16), Rig("hopper", "cuda", 128, 128, torch.bfloat16)]
BACKENDS = [Rig("triton")] if INTERPRETED else [Rig("torch"), Rig("reference"), *ON_GPU]

RIGS = [
    pytest.param(
        replace(rig, by_mass=by_mass),
        id=f"{rig.backend}-{'mass' if by_mass else 'stem'}",
        marks=[pytest.mark.gpu] if rig.device == "cuda" else [],
    )
    for rig in BACKENDS
    for by_mass in ((False,) if INTERPRETED else (False, True))  # interpreted.py has tests of its own for the other rule
]


@pytest.fixture(params=RIGS)
def rig(request: pytest.FixtureRequest) -> Rig:
    """A backend, and shapes and numbers that suit it."""
    if request.param.obstacle:
        pytest.skip(request.param.obstacle)
    return request.param


@pytest.fixture(autouse=True, scope="session")
def interpreted_kernels_take_cpu_tensors() -> Iterator[None]:
    """Under Triton's interpreter the backend for GPUs runs where there is none."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            from stem_attention.backends.triton import TritonBackend

            patch.setattr(TritonBackend, "why_not", lambda self, request: None)
        yield


def peaked(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """As ``make_qkv``, with queries and keys whose attention is far from even, so that something is dropped."""
    q, k, v = make_qkv(*shape)
    return (3 * q).to(dtype), (3 * k).to(dtype), v.to(dtype)


def under_the_interpreter(*arguments: str) -> str:
    """What tests say in a process of their own under Triton's interpreter, which a whole process must choose."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["TRITON_INTERPRET"] = "1"
    root = Path(__file__).parents[1]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=root)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def equal(a, b) -> bool:
    """Bit for bit, and nothing is NaN."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
