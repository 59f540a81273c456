"""The Hopper kernel compiles as the library launches it, fits its shared memory and keeps its numbers in registers."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.backends.triton.offline import Recorder, resources, variants

from stem_attention.backends.hopper import (
    BLOCK_SIZES,
    HEAD_DIMS,
    attention,
    pair_consumer,
    pair_producer,
    schedule,
)
from stem_attention.backends.hopper.attention import LAUNCHES
from stem_attention.backends.hopper.launch import entry_registers
from stem_attention.backends.triton.layout import Layout
from stem_attention.call import Call, PackedBatch
from stem_attention.policies import Dense

SHARED_PER_MULTIPROCESSOR = 228 << 10  # of which each program reserves 1 KB

# Bytes of stack that the measured kernels have, none of them in the main loop: scalars that a task touches once.
# With Triton 3.8 blocks of 64 at head_dim 64 have 40, some in the loop, with 3.6 none; keys of 192 have 8 more than with 3.6.
STACK = {
    (128, 64): 0, (128, 128): 64, (128, 192): 112, (128, 256): 160,
    (64, 64): 40, (64, 128): 0, (64, 192): 0, (64, 256): 0,
}  # fmt: skip
# More where keys lie in pages, all of it the producer's: with 40 registers in place of 24 it would spill less, but those are
# the consumers', and blocks of 64 at head_dim 128 are then a tenth to a third slower (H100).
PAGE_STACK = {0: 0, 32: 40}


def compiled(
    block_size: int = 128, dim: int = 128, dtype: torch.dtype = torch.bfloat16, ragged: bool = False, page: int = 0,
    lse: bool = True, sinks: torch.dtype | None = None, softcap: float | None = None,
) -> Any:  # fmt: skip
    """What the host code would launch for 300 queries of 8 heads, compiled instead."""
    batch, table = None, torch.zeros(1, 4, dtype=torch.int32) if page else None
    q, k = torch.zeros(1, 300, 8, dim, dtype=dtype), torch.zeros(1, 300, 2, dim, dtype=dtype)
    if ragged or page:
        q, k, batch = q[0], k[0], PackedBatch.plan([300], [300], page_table=table, device=q.device)
    if page:
        k = torch.zeros(8, page, 2, dim, dtype=dtype)
    extra = {"sinks": None if sinks is None else torch.zeros(8, dtype=sinks), "softcap": softcap}
    v = k[..., : HEAD_DIMS[dim]].contiguous()
    call = Call(q, k, v, Dense(block_size), 0.1, 300, batch, return_lse=lse, **extra)
    indices, launches = torch.zeros(1, 8, -(-300 // block_size), 3, dtype=torch.int32), Recorder()
    layout, counts = Layout.of(call, block_size, launches), indices[..., 0].contiguous()
    attention.attend(call, layout, indices, counts, block_size, 2, launches)
    return launches.recorded[0].warmed()


def barriers_and_tasks(ptx: str) -> tuple[set[int], set[int]]:
    """Offsets in shared memory of the barriers that are set up, and of what is loaded from a fixed place."""
    offsets = dict(re.findall(r"add\.s32 \t(%r\d+), %r\d+, (\d+);", ptx))
    barriers = {int(offsets.get(name, 0)) for name in re.findall(r"mbarrier\.init\.shared::cta\.b64 \[(%r\d+)", ptx)}
    return barriers, {int(n) for n in re.findall(r"ld\.shared\.v4\.b32 \t\{.*\}, \[global_smem\+(\d+)\]", ptx)}


# What orders accesses to shared memory, these accesses, and where control may come from or go to.
MARK = re.compile(r"(?:@!?%p\d+\s+)?((?:barrier|bar|mbarrier|ld\.shared|st\.shared|bra|brx|ret)\b.*|\$L__BB\w+:)")


def marks(ptx: str) -> list[tuple[str, str]]:
    """The kernel's marks, without predicates, each with the line of the source that it comes from."""
    found, place = [], ""
    for text in map(str.strip, ptx.splitlines()):
        if named := re.match(r"\.loc\s.*// (\w+\.py:\d+)", text):
            place = named[1]
        elif mark := MARK.match(text):
            found.append((place, mark[1]))
    return found


def place_of(module: ModuleType, code: str) -> str:
    """The line of a source that holds this, as ``marks`` name it."""
    file = Path(str(module.__file__))
    (number,) = [i for i, line in enumerate(file.read_text().splitlines(), 1) if code in line]
    return f"{file.name}:{number}"


def windows(found: list[tuple[str, str]], access: str, place: str) -> list[str]:
    """The mark before each such run of accesses to shared memory, the first of them, and the two marks behind the run."""
    inside = [bool(re.match(access, text)) and where.startswith(place) for where, text in found]
    starts = [i for i, here in enumerate(inside) if here and not inside[i - 1]]
    ends = [next(j for j in range(i, len(found)) if not inside[j]) for i in starts]
    spots = [[i - 1, i, j, j + 1] for i, j in zip(starts, ends, strict=True)]
    return [" ".join(found[at][1] for at in spot if at < len(found)) for spot in spots]


def assert_workers_ordered(found: list[tuple[str, str]], kernel: str) -> None:
    """Assert it of the function that Triton's workers run, which a kernel's file writes and reads."""
    (state,) = windows(found, r"ld\.shared\.[bu]8\b", kernel)
    match = re.match(r"barrier\.sync\s+1; ld\.shared.*?\+(\d+)\];", state)
    assert match, state
    # A byte for every warp; the four that start the workers have none. Other stores may stand between it and the barriers.
    store = rf"st\.shared.*\[global_smem\+{int(match[1]) + 4}\]"
    found = [(place, text) for place, text in found if not text.startswith("st.shared") or re.match(store, text)]
    start, end = windows(found, store, kernel)
    assert re.match(r"\S.*; st\.shared.*?; barrier\.sync\s+1; barrier\.sync\s+1;", start)
    assert re.match(r"barrier\.sync\s+1; st\.shared.*?; barrier\.sync\s+1;", end)


def assert_ordered(ptx: str, shape: tuple[int, int]) -> None:
    """Tasks, plans and the state of Triton's workers are read and written only where a barrier has ordered them."""
    found, pairs = marks(ptx), LAUNCHES[shape].rows == 2
    consumers = LAUNCHES[shape].rows * shape[0] // 64
    # Of the first task and of the next ones.
    reads = windows(found, r"ld\.shared", place_of(schedule, "task_s.index(slot).load("))
    read = r"mbarrier\.try_wait.*; ld\.shared.*; bar\.sync\s+(\d+), 128; mbarrier\.arrive\.shared.*"
    groups = [match[1] for text in reads if (match := re.fullmatch(read, text))]
    assert len(reads) == len(groups) == 2 * len(set(groups)) == 2 * consumers, reads
    # Of a task, and that there are no more.
    writes = windows(found, r"st\.shared", place_of(schedule, "task_s.index(slot).store("))
    assert len(writes) == 2
    written = r"mbarrier\.try_wait.*; st\.shared.*; bar\.warp\.sync\s+-1; mbarrier\.arrive\.shared.*"
    assert all(re.fullmatch(written, text) for text in writes), writes

    if pairs:
        # One load reads both words of a plan.
        told = windows(found, r"ld\.shared\.v2", place_of(pair_consumer, "plan_s.index(plan * 2).load("))
        assert len(told) >= consumers
        assert all(re.fullmatch(read, text) for text in told), told
        for word, orders in (("2 * plan", r"mbarrier\.try_wait.*; st\."), ("2 * plan + 1", r".*; mbarrier\.arrive\.shared")):
            written = windows(found, r"st\.shared", place_of(pair_producer, f"plan_s.index({word}).store("))
            assert len(written) == 2
            assert all(re.match(orders, text) for text in written), written

    assert_workers_ordered(found, "pair_kernel.py" if pairs else "kernel.py")


VARIANTS = {
    **{f"block-{b}-dim-{d}": {"block_size": b, "dim": d} for b in BLOCK_SIZES for d in HEAD_DIMS},
    "fp16-no-lse": {"dtype": torch.float16, "lse": False},
    "ragged": {"ragged": True},
    "page-32": {"page": 32},
    "page-64": {"page": 64},
    "page-128-dim-256": {"page": 128, "dim": 256},
    "ragged-block-64": {"ragged": True, "block_size": 64},
    "page-32-block-64": {"page": 32, "block_size": 64},
    "page-64-block-64": {"page": 64, "block_size": 64},
    "page-128-block-64": {"page": 128, "block_size": 64},
    "page-64-block-64-dim-64": {"page": 64, "block_size": 64, "dim": 64},
    "ragged-dim-192": {"ragged": True, "dim": 192},
    "page-32-dim-192": {"page": 32, "dim": 192},
    "page-64-block-64-dim-192": {"page": 64, "block_size": 64, "dim": 192},
    "sinks-block-64-dim-192": {"block_size": 64, "dim": 192, "sinks": torch.bfloat16},
    "sinks-block-64-dim-64": {"block_size": 64, "dim": 64, "sinks": torch.bfloat16},
    **{f"cap-block-{b}-dim-{d}": {"block_size": b, "dim": d, "softcap": 50.0} for b in BLOCK_SIZES for d in HEAD_DIMS},
    "sinks-ragged": {"ragged": True, "sinks": torch.float32},
}


# With the newest Triton too: both kernels, pages, queries in registers, and values of 128 beside keys of 192.
NEWEST = ("ragged", "ragged-block-64", "page-64", "block-64-dim-64", "sinks-block-64-dim-192")


@pytest.mark.parametrize("variant", variants(VARIANTS, *NEWEST))
def test_every_variant_fits_and_keeps_its_numbers_in_registers(variant):
    made = compiled(**VARIANTS[variant])
    shape = VARIANTS[variant].get("block_size", 128), VARIANTS[variant].get("dim", 128)
    programs = LAUNCHES[shape].programs
    assert programs * (made.metadata.shared + 1024) <= SHARED_PER_MULTIPROCESSOR
    _, stack = resources(made.asm["cubin"])
    cap = 8 if "softcap" in VARIANTS[variant] else 0  # of a scalar that a task touches once
    assert stack <= STACK[shape] + cap + PAGE_STACK.get(VARIANTS[variant].get("page", 0), 16)
    products = set(re.findall(r"wgmma\.mma_async\S*\.m64n(\d+)k16", made.asm["ptx"]))
    # Scores of a whole step in one (of keys of 192 in two), and its weighted values.
    assert products == {str(LAUNCHES[shape].tile), str(HEAD_DIMS[shape[1]])}
    assert "cp.async.bulk.tensor" in made.asm["ptx"]


@pytest.mark.newest_triton
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_a_task_never_lies_where_a_barrier_was(block_size):
    """PTX forbids to use a barrier's memory otherwise without mbarrier.inval. Rows were lost when Triton put tickets there."""
    barriers, tasks = barriers_and_tasks(compiled(block_size=block_size, ragged=True).asm["ptx"])
    choice = LAUNCHES[block_size, 128]
    # A "full" and an "empty" one for every slot, two for queries, four for tasks, two for turns where there are partners.
    # Pairs of rows have three rings, queries each, and 16 for plans.
    rest = 24 if choice.rows == 2 else 6 + (2 if block_size == 128 else 0)
    assert len(barriers) == 4 * (2 * choice.rows - 1) * choice.slots + rest
    assert tasks
    assert not any(start < task + 16 and task < start + 8 for start in barriers for task in tasks)


@pytest.mark.parametrize("variant", variants(VARIANTS, *NEWEST))
def test_what_warps_tell_each_other_is_ordered(variant):
    """racecheck reports these accesses: it does not see what orders them (docs/reliability.md)."""
    shape = VARIANTS[variant].get("block_size", 128), VARIANTS[variant].get("dim", 128)
    assert_ordered(compiled(**VARIANTS[variant]).asm["ptx"], shape)


@pytest.mark.newest_triton
@pytest.mark.parametrize("missing", ["bar.sync", "bar.warp.sync", "barrier.sync", "mbarrier.try_wait", "mbarrier.arrive"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_a_missing_barrier_is_noticed(block_size, missing):
    ptx = compiled(block_size=block_size, ragged=True).asm["ptx"]
    assert_ordered(ptx, (block_size, 128))
    without = re.sub(rf"^.*\b{re.escape(missing)}\b.*\n", "", ptx, flags=re.MULTILINE)
    with pytest.raises(AssertionError):
        assert_ordered(without, (block_size, 128))


@pytest.mark.parametrize("shape", LAUNCHES, ids=str)
def test_the_programs_of_a_multiprocessor_share_its_registers(shape):
    choice = LAUNCHES[shape]
    warpgroups = choice.rows * shape[0] // 64 + 1
    registers = entry_registers(choice.warpgroups(shape[0]), choice.programs)
    assert registers % 8 == 0
    assert registers * 128 * warpgroups * choice.programs <= 65536
