"""Every kernel compiles for every family of cards, fits its shared memory and keeps its numbers in registers."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from stem_attention import Mass, Stem
from stem_attention.backends.triton.launch import attention_launch

from .offline import (
    SHARED_LIMIT,
    TARGETS,
    Compiled,
    Recorded,
    compile_for,
    record_attention,
    record_backward,
    record_packing,
    record_selection,
    variants,
)

FP16 = torch.float16


# Bytes of stack that were measured to be worth it, by card, head_dim and block size, on an H200. Blocks of 64: four warps
# spill 8 bytes and reach 393 TFLOP/s, eight warps spill nothing and reach 238. Blocks of 128 from pages of 128: tiles of 64
# spill 80 bytes and reach 333 TFLOP/s, tiles of 32 spill nothing and reach 223. Keys of 192 and values of 128: not measured.
SPILLS = {("sm90", 256, 64): 8, ("sm90", 256, 128): 80, ("sm80", 192, 64): 24}
# Under a soft cap, by the same: few loads and stores of a row's numbers.
CAP_SPILLS = {("sm80", 256, 128): 8, ("sm120", 256, 128): 8, ("sm90", 256, 64): 128}
# Under a window, by the same: two words.
WINDOW_SPILLS = {("sm80", 64, 64): 8, ("sm120", 256, 128): 8}
# Of the gradient's, by the same: two words, beside 128 registers of sums. Under a cap, and for keys of 192 over values of 128,
# what fits was not looked for.
BACKWARD_SPILLS = {("sm90", 128, 64): 8, ("sm90", 192, 128): 112}
CAP_BACKWARD_SPILLS = {("sm90", 128, 128): 8, ("sm90", 128, 64): 8, ("sm90", 256, 128): 168}
# Triton 3.8's ptxas takes 64, 80 or 128 registers, so that two programs fit on a multiprocessor, and some bytes of stack for
# it.
CHEAP_STACK = {"choose_kernel": 16, "pool_kernel": 8, "keep_kernel": 40}
# A row of 16384 blocks, which only a million tokens in blocks of 64 have, is more than these cards' registers hold.
LONGEST_ROW, LONGEST_ROW_STACK = 16384, {"sm100": 48, "sm120": 80, "gfx942": 79}


def fits(target: str, launch: Recorded) -> Compiled:
    compiled = compile_for(target, launch)
    shape = target, launch.arguments.get("D"), launch.arguments.get("B")
    allowed = SPILLS.get(shape, 0)
    if launch.arguments.get("steepness") is not None:
        allowed = max(allowed, CAP_SPILLS.get(shape, 0))
    if launch.arguments.get("window") is not None:
        allowed = max(allowed, WINDOW_SPILLS.get(shape, 0))
    if launch.kernel.fn.__name__ in ("dq_kernel", "dkv_kernel"):
        capped = launch.arguments["steepness"] is not None
        allowed = (CAP_BACKWARD_SPILLS if capped else BACKWARD_SPILLS).get(shape, 0)
    if target != "sm90":
        allowed = max(allowed, CHEAP_STACK.get(launch.kernel.fn.__name__, 0))
    if launch.arguments.get("COLUMNS") == LONGEST_ROW:
        allowed = max(allowed, LONGEST_ROW_STACK.get(target, 0))
    assert compiled.shared <= SHARED_LIMIT[target], "shared memory"
    assert compiled.spills <= allowed, f"spills at {compiled.registers} registers"
    return compiled


@pytest.mark.parametrize("shape", variants(product([64, 80, 128, 256], [64, 128]), (128, 64)))
@pytest.mark.parametrize("target", TARGETS)
def test_attention(target, shape):
    dim, block_size = shape
    compiled = fits(target, record_attention(target, dim=dim, block_size=block_size))
    tma = attention_launch(target, dim, block_size).tma
    assert ("cp.async.bulk.tensor" in compiled.assembly) == tma
    matrix_unit = {"sm80": "mma.sync", "sm90": "wgmma.mma_async", "sm100": "tcgen05.mma", "sm120": "mma.sync"}
    assert matrix_unit.get(target, "v_mfma_f32") in compiled.assembly


# What one launch shows is not shown by another again: what holds with a window, pages or a cap holds without.
VARIANTS = {
    "page-16": {"page": 16},
    "page-128": {"page": 128},
    "page-128-dim-256": {"page": 128, "dim": 256},
    "page-1-block-64": {"page": 1, "block_size": 64},
    "ragged-dim-80-fp16-no-lse": {"ragged": True, "dim": 80, "dtype": FP16, "lse": False},
    "cap-dim-256": {"dim": 256, "softcap": 50.0},
    "cap-dim-256-block-64-page-64": {"dim": 256, "block_size": 64, "page": 64, "softcap": 50.0},
    "cap": {"softcap": 50.0},
    "dim-192-values-128": {"dim": 192, "value_dim": 128},
    "dim-192-values-128-block-64-page-64": {"dim": 192, "value_dim": 128, "block_size": 64, "page": 64},
    "dim-64-values-256": {"dim": 64, "value_dim": 256},
    "dim-256-values-16-block-64-page-64": {"dim": 256, "value_dim": 16, "block_size": 64, "page": 64},
    "sinks-page-64": {"page": 64, "sinks": torch.float32},
    "window-dim-256": {"dim": 256, "window": 1000},
    "window-block-64-dim-64-sinks": {"block_size": 64, "dim": 64, "window": 128, "sinks": torch.bfloat16},
    "window-ragged": {"ragged": True, "window": 1000},
}


@pytest.mark.parametrize("variant", variants(VARIANTS, "page-128-dim-256"))
@pytest.mark.parametrize("target", TARGETS)
def test_attention_in_packed_batches_and_caches(target, variant):
    fits(target, record_attention(target, **VARIANTS[variant]))


@pytest.mark.parametrize("target", [name for name in TARGETS if attention_launch(name, 128, 128).tma])
def test_attention_through_pointers_where_strides_forbid_descriptors(target):
    choice = replace(attention_launch(target, 128, 128), tma=False)
    compiled = compile_for(target, record_attention(target, launch=choice))
    assert "cp.async.bulk.tensor" not in compiled.assembly
    assert compiled.shared <= SHARED_LIMIT[target]


SELECTIONS = {
    "default": {},
    "short": {"length": 4000, "implicit": False},
    "million": {"length": 1 << 20},
    "million-block-64": {"length": 1 << 20, "policy": Stem(block_size=64)},
    "angelslim-dim-256": {"policy": Stem.paper(stride=8, forced="extra"), "dtype": FP16, "length": 20001, "dim": 256},
    "cap-block-64-dim-80": {"policy": Stem(block_size=64), "dim": 80, "softcap": 50.0},
    "ragged-dim-192-values-128": {"ragged": True, "length": 9999, "dim": 192, "value_dim": 128},
    "page-1-dim-256": {"page": 1, "dim": 256, "length": 9999},
    "page-16": {"page": 16, "length": 300000},
}


@pytest.mark.parametrize("inputs", variants(SELECTIONS, "million-block-64"))
@pytest.mark.parametrize("target", TARGETS)
def test_selection(target, inputs):
    launches = record_selection(target, **{"policy": Stem(), **SELECTIONS[inputs]})
    assert set(launches) == {"pool_keys", "pool_queries", "score_kernel", "choose_kernel"}
    for launch in launches.values():
        fits(target, launch)


FACTORS = {"head_factors": [[0.5, 1, 2, 4, 0.25, 1, 3, 8]]}
MASSES = {
    "default": {},
    "million": {"length": 1 << 20},
    "short-block-128-pools-of-8-dim-64": {
        "policy": Mass(block_size=128, query_pool=8, key_pool=8), "dtype": FP16, "length": 4000, "implicit": False, "dim": 64,
    },
    "factors-means-alone-pools-of-a-block-dim-80": {
        "policy": Mass(query_pool=64, key_pool=64, spread=0.0, **FACTORS), "dim": 80,
    },
    "ragged-dim-192-values-128": {"ragged": True, "length": 9999, "dim": 192, "value_dim": 128},
    "factors-page-1-dim-256": {"policy": Mass(**FACTORS), "page": 1, "dim": 256, "length": 9999},
    "page-16": {"page": 16, "length": 300000},
    "cap-dim-256": {"dim": 256, "softcap": 50.0},
}  # fmt: skip


@pytest.mark.parametrize("inputs", variants(MASSES, "factors-page-1-dim-256"))
@pytest.mark.parametrize("target", TARGETS)
def test_selection_by_mass(target, inputs):
    launches = record_selection(target, **{"policy": Mass(), **MASSES[inputs]})
    assert set(launches) == {"pool_kernel", "keep_kernel"}
    assert (launches["keep_kernel"].arguments["head_shares"] is not None) == ("factors" in inputs)
    for launch in launches.values():
        fits(target, launch)


@pytest.mark.parametrize("target", TARGETS)
def test_the_norms_of_the_z_score(target):
    fits(target, record_selection(target, policy=Stem())["pool_keys"].changed(NORMS=8))


@pytest.mark.parametrize("dim", variants([64, 80, 256], 80))
@pytest.mark.parametrize("target", ["sm90", "sm100", "sm120"])
def test_packing_of_an_fp8_cache(target, dim):
    for by_head in (False, True):
        fits(target, record_packing(dim, by_head))


BACKWARD = {
    "fp16": {"dtype": FP16},
    "ragged-block-64": {"ragged": True, "block_size": 64},
    "ragged-dim-80-fp16": {"ragged": True, "dim": 80, "dtype": FP16},
    "ragged-dim-256": {"ragged": True, "dim": 256},
    "cap-block-64": {"block_size": 64, "softcap": 50.0},
    "cap-dim-256": {"dim": 256, "softcap": 50.0},
    "values-of-128-dim-192": {"dim": 192, "value_dim": 128},
    "dim-64-block-64": {"dim": 64, "block_size": 64},
    "dim-64-block-128": {"dim": 64},
    "dim-128-block-64": {"block_size": 64},
    "dim-256-block-64": {"dim": 256, "block_size": 64},
    "dim-256-block-128": {"dim": 256},
}
KERNELS = {"delta_kernel", "pack_kernel", "rows_kernel", "columns_kernel", "dq_kernel", "dkv_kernel", "sum_kernel"}


@pytest.mark.parametrize("variant", variants(BACKWARD, "ragged-dim-80-fp16", "dim-128-block-64"))
@pytest.mark.parametrize("target", TARGETS)
def test_gradients(target, variant):
    launches = record_backward(target, **BACKWARD[variant])
    assert set(launches) == KERNELS
    for name, launch in launches.items():
        if name not in ("dq_kernel", "dkv_kernel") and variant not in ("fp16", "ragged-dim-80-fp16"):
            continue  # they hardly differ
        compiled = fits(target, launch)
        descriptors = target in ("sm90", "sm100") and "ragged" not in variant and name in ("dq_kernel", "dkv_kernel")
        assert ("cp.async.bulk.tensor" in compiled.assembly) == descriptors


@pytest.mark.parametrize("variant", ["ragged-block-64", "dim-128-block-64", "dim-256-block-128"])
@pytest.mark.parametrize("target", TARGETS)
def test_the_loop_with_two_sums_is_not_pipelined(target, variant):
    """Triton 3.6 makes wrong code of such a loop where its length is not known: two sums in fp32, several stages."""
    assert record_backward(target, **BACKWARD[variant])["dkv_kernel"].options["num_stages"] == 1
