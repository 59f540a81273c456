"""Hopper's kernel of the gradient compiles as it is launched, keeps its sums in registers and its products in flight."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.backends.triton.offline import Recorded, Recorder, dumped, resources, variants

from stem_attention.backends.hopper import backward, backward_kernel
from stem_attention.backends.hopper.backward import LAUNCHES
from stem_attention.backends.triton import backward_kernels
from stem_attention.backends.triton.layout import Layout
from stem_attention.call import Call, PackedBatch
from stem_attention.policies import Dense

from .test_hopper_compile import SHARED_PER_MULTIPROCESSOR, assert_workers_ordered, marks, place_of, windows

# Bytes of stack: scalars of a column, needed in the loop but once, in blocks of 64. Triton 3.8 takes more in fp16.
STACK = {(128, 64): 0, (128, 128): 16, (64, 64): 0, (64, 128): 32}


def started(
    block_size: int = 128, dim: int = 128, dtype: torch.dtype = torch.bfloat16, packed: bool = False,
    softcap: float | None = None, expanded: bool = False, value_dim: int | None = None,
) -> Recorded:  # fmt: skip
    """What the host code launches for 300 queries of 8 heads."""
    q, k = torch.zeros(1, 300, 8, dim, dtype=dtype), torch.zeros(1, 300, 2, dim, dtype=dtype)
    v, d_out = (x[..., :value_dim].contiguous() for x in (k, q))
    call = Call(q, k, v, Dense(block_size), 0.1, 300)
    if packed:
        call = Call(q[0], k[0], v[0], Dense(block_size), 0.1, batch=PackedBatch.plan([300], [300], device=q.device))
    d_out = q[..., :1].expand(q.shape) if expanded else d_out
    table, rows, sums = torch.zeros(64, dtype=torch.int32), torch.zeros(1, 8, 300), torch.zeros(4, block_size, dim)
    columns: Any = SimpleNamespace(
        lists=table, starts=table, longest=table[:1], chunks=table[:6], firsts=table, owners=table, slots=table
    )
    launches, steepness = Recorder(), None if softcap is None else 0.1 / softcap
    backward.start_chunks(
        Layout.of(call, block_size, launches), block_size, (q, k, v, d_out, rows, rows), (k, v.clone(), sums, sums.clone()),
        columns, (0.1, 0.1, steepness), launches,
    )  # fmt: skip
    return launches.recorded[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", variants(LAUNCHES, (64, 128)))
def test_every_variant_fits_and_waits_for_no_product_by_itself(shape, dtype):
    made, choice = started(*shape, dtype).warmed(), LAUNCHES[shape]
    assert choice.programs * (made.metadata.shared + 1024) <= SHARED_PER_MULTIPROCESSOR
    _, stack = resources(made.asm["cubin"])
    assert stack <= STACK[shape] + (64 if dtype == torch.float16 else 0)
    products = set(re.findall(r"wgmma\.mma_async\S*\.m64n(\d+)k16", made.asm["ptx"]))
    assert products == {"64", str(shape[1])}
    # Where ptxas cannot follow the registers of products, it waits for every one.
    waits = re.findall(r"WARPGROUP\.DEPBAR", dumped(made.asm["cubin"], "-sass"))
    assert len(waits) == 3 * shape[0] // 64


@pytest.mark.parametrize("block_size", variants([64, 128], 64))
def test_what_warps_tell_each_other_is_ordered(block_size):
    found = marks(started(block_size).warmed().asm["ptx"])
    (store,) = windows(found, r"st\.shared", place_of(backward_kernel, "edge_s.index(s).store("))
    assert re.fullmatch(r"st\.shared.*; st\.shared.*; bar\.warp\.sync\s+-1; mbarrier\.arrive\.shared.*", store), store
    # A slot is given back when all four warps have read it.
    arrivals = windows(found, r"mbarrier\.arrive", place_of(backward_kernel, "mbarrier.arrive(empty.index(s)"))
    groups = [re.match(r"bar\.sync\s+(\d+), 128; mbarrier", text) for text in arrivals]
    assert len({group[1] for group in groups if group}) == len(groups) == block_size // 64, arrivals
    assert_workers_ordered(found, "backward_kernel.py")


@pytest.mark.parametrize(
    "other", [{"packed": True}, {"softcap": 50.0}, {"expanded": True}, {"dim": 256}, {"value_dim": 64}], ids=str
)
def test_the_portable_kernel_takes_the_rest(other):
    assert started(**other).kernel is backward_kernels.dkv_kernel


@pytest.mark.parametrize("shape", LAUNCHES, ids=str)
def test_the_programs_of_a_multiprocessor_share_its_registers(shape):
    registers = LAUNCHES[shape].options(shape[0]).get("maxnreg", 0)
    assert registers * 128 * (shape[0] // 64 + 1) * LAUNCHES[shape].programs <= 65536
