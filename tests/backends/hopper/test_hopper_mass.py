"""The Hopper kernel that keeps by mass compiles as the library launches it, and fits a multiprocessor as often as it should."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from tests.backends.triton.offline import Recorded, Recorder, resources, variants

from stem_attention import Mass
from stem_attention.backends.hopper import HopperBackend, mass_kernel
from stem_attention.backends.hopper.mass import choose
from stem_attention.backends.triton import mass as portable
from stem_attention.backends.triton import mass_kernels
from stem_attention.backends.triton.layout import Layout
from stem_attention.call import Call, PackedBatch

from .test_hopper_compile import SHARED_PER_MULTIPROCESSOR, assert_workers_ordered, marks

REGISTERS_OF_ONE = 1 << 16
THREADS = 3 * 128  # two warpgroups that compute, and one of which a warp copies
DIMS = (64, 128, 256)


@pytest.fixture(autouse=True)
def _portable_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable, "architecture", lambda _: "sm90")
    monkeypatch.setattr(portable, "_head_shares", lambda *_: torch.empty((1, 8), device="meta"))


def launched(
    policy: Mass | None = None, dim: int = 128, dtype: torch.dtype = torch.bfloat16, ragged: bool = False,
    softcap: float | None = None, implicit: bool = True, counted: bool = False, length: int = 20000,
) -> Recorded:  # fmt: skip
    """What turns the pools of 8 heads into lists."""
    policy, batch = Mass() if policy is None else policy, None
    q, k = (torch.empty(1, length, heads, dim, dtype=dtype, device="meta") for heads in (8, 2))
    if ragged:
        q, k, batch = q[0], k[0], PackedBatch.plan([length], [length], device=torch.device("meta"))
    kept = torch.empty(1, dtype=torch.int64, device="meta") if counted else None
    call, launches = Call(q, k, k, policy, 0.1, length, batch, softcap=softcap, kept=kept), Recorder()
    selector = HopperBackend().selector(policy)
    assert selector is not None
    selector(call, Layout.of(call, policy.block_size, launches), 0, implicit, launches)
    return launches.recorded[-1]


VARIANTS = {
    **{f"dim-{dim}": {"dim": dim} for dim in DIMS},
    "short": {"length": 4000},
    "fp16-with-lists": {"dtype": torch.float16, "implicit": False},
    "ragged": {"ragged": True},
    "ragged-dim-64": {"ragged": True, "dim": 64},
    "ragged-dim-256": {"ragged": True, "dim": 256},
    "cap": {"softcap": 50.0},
    "means-alone": {"policy": Mass(spread=0.0)},
    "factors": {"policy": Mass(head_factors=[[0.5, 1, 2, 4, 0.25, 1, 3, 8]])},
    "counted": {"counted": True},
    "block-128": {"policy": Mass(block_size=128)},
    "block-128-short-pools": {"policy": Mass(block_size=128, query_pool=2, key_pool=2)},
    "half-rows": {"policy": Mass(query_pool=32)},
}  # fmt: skip


@pytest.mark.parametrize("variant", variants(VARIANTS, "dim-128", "ragged-dim-256"))
def test_every_variant_fits(variant):
    launch = launched(**VARIANTS[variant])
    two = launch.arguments["D"] == 128 and variant != "short"
    most = choose(launch.arguments["D"], 16384 + two).entry_registers
    made = launch.warmed()
    assert (1 + two) * (made.metadata.shared + 1024) <= SHARED_PER_MULTIPROCESSOR
    registers, stack = resources(made.asm["cubin"])
    assert registers <= most
    assert most * THREADS * (1 + two) <= REGISTERS_OF_ONE
    # Where two programs share the registers: scalars, and the few numbers of a row that a step reads once.
    assert stack <= (256 if two else 0)
    assert set(re.findall(r"wgmma\.mma_async\S*\.m64n(\d+)k16", made.asm["ptx"])) == {"64"}
    assert "cp.async.bulk.tensor" in made.asm["ptx"]
    assert_workers_ordered(marks(made.asm["ptx"]), "mass_kernel.py")


@pytest.mark.parametrize(
    ("policy", "own"),
    [
        (Mass(), True),
        (Mass(query_pool=1, key_pool=1), True),
        (Mass(block_size=128, query_pool=2, key_pool=2), True),
        (Mass(key_pool=64), False),  # 64 blocks a step are more than a word has bits
        (Mass(query_pool=64), False),  # so many lists would take the registers
        (Mass(block_size=128, query_pool=1), False),  # 128 pools a row are more than a warpgroup has rows
        (Mass(block_size=128, key_pool=1), False),  # a step has not one block
    ],
    ids=lambda x: x if isinstance(x, bool) else f"{x.block_size}-{x.query_pool}-{x.key_pool}",
)
def test_other_pools_take_the_portable_kernel(policy, own):
    launch = launched(replace(policy, tail_blocks=0))
    assert launch.kernel is (mass_kernel.keep_kernel if own else mass_kernels.keep_kernel)
