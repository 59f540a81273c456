"""On a GPU: attention sinks, soft caps, and values of another dimension than keys."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.fuzz.judge import assert_selected

from stem_attention import (
    BlockSelection,
    Mass,
    Stem,
    block_sparse_attention,
    explain,
    select_blocks,
    stem_attention,
    stem_attention_varlen,
)
from stem_attention.backends import backend_of
from stem_attention.backends.hopper import HEAD_DIMS
from stem_attention.call import Call
from stem_attention.testing import assert_accurate, make_qkv, pack, random_selection, structured_qkv

from .common import LENGTHS, on_gpu, random_qkv

pytestmark = on_gpu

SINKS = (0.5, -torch.inf, 4.0, 40.0)
FORMS = ["sinks", "cap", "both"]


def extra_of(form: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """The arguments of a form, of four heads."""
    sinks = None if form == "cap" else torch.tensor(SINKS, device="cuda", dtype=dtype)
    return {"sinks": sinks, "softcap": None if form == "sinks" else 5.0}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("block_size", [64, 128])
def test_attention_over_lists(block_size, dim, form, backend):
    q, k, v = structured_qkv(1, 1500, 1800, 4, 2, dim, torch.bfloat16, "cuda")
    selection = random_selection(1, 4, 1500, 1800, block_size, device="cuda")
    for dtype in (torch.bfloat16, torch.float32):
        extra = extra_of(form, dtype)
        result = block_sparse_attention(q, k, v, selection, return_lse=True, backend=backend, **extra)
        assert_accurate(*result, q, k, v, selection, **extra)
        assert torch.equal(block_sparse_attention(q, k, v, selection, backend=backend, **extra), result[0])


@pytest.mark.parametrize("policy", [Mass(), Stem(), Mass(block_size=128)], ids=["mass", "stem", "mass-128"])
@pytest.mark.parametrize("form", FORMS)
def test_the_whole_is_selection_and_attention_and_short_prompts_are_dense(form, policy, backend):
    q, k, v = structured_qkv(1, 3000, 9001, 4, 2, 128, torch.bfloat16, "cuda")
    extra, options = extra_of(form), {"policy": policy, "backend": backend}
    selection = select_blocks(q, k, v, softcap=extra["softcap"], **options)
    assert_selected(selection, q, k, v, policy, 9001, softcap=extra["softcap"])
    apart = block_sparse_attention(q, k, v, selection, return_lse=True, backend=backend, **extra)
    for _ in range(2):  # the second runs the first one's program
        whole = stem_attention(q, k, v, dense_below=0, return_lse=True, **options, **extra)
        assert all(map(torch.equal, whole, apart))
    everything = random_selection(1, 4, 500, 700, policy.block_size, density=1e9, device="cuda")
    short = q[:, :500], k[:, :700], v[:, :700]
    assert_accurate(stem_attention(*short, **options, **extra), None, *short, everything, **extra)


@pytest.mark.parametrize("page", [0, 1, 64])
@pytest.mark.parametrize("form", FORMS)
def test_packed_batches(form, page, backend):
    single = [structured_qkv(1, *lengths, 4, 2, 128, torch.bfloat16, "cuda", seed=i) for i, lengths in enumerate(LENGTHS)]
    extra, policy = extra_of(form), Mass()
    out, lse = stem_attention_varlen(
        **pack(single, page), policy=policy, dense_below=0, return_lse=True, backend=backend, **extra
    )
    for i, (low, high) in enumerate(pairwise(pack(single)["cu_seqlens_q"].tolist())):
        if low < high:
            selection = select_blocks(*single[i], policy=policy, softcap=extra["softcap"], backend=backend)
            assert_accurate(out[None, low:high], lse[None, :, low:high], *single[i], selection, **extra)


def test_programs_of_other_forms_are_others(backend):
    """Calls that differ by a form alone, or by the place of their sinks, one after the other and then again."""
    q, k, v = random_qkv(1, 900, 900, 4, 2, 128)
    plain = {"sinks": None, "softcap": None}
    many = torch.randn(9, 4, device="cuda")
    forms = [plain, extra_of("sinks"), extra_of("sinks", torch.float32), extra_of("cap"), extra_of("both"), plain]
    forms += [{"sinks": row} for row in many] + [{"sinks": many.flatten()[1:5]}, {"softcap": 2.0}]
    policy = Mass(share=6.0)
    before = len(backend_of(Call(q, k, v, policy, 0.1, backend=backend))._programs)
    for extra in forms * 2:
        cap = extra.get("softcap")
        selection = select_blocks(q, k, v, policy=policy, softcap=cap, backend=backend)
        out = stem_attention(q, k, v, policy=policy, dense_below=0, backend=backend, **extra)
        assert torch.equal(out, block_sparse_attention(q, k, v, selection, backend=backend, **extra))
    # Aligned sinks of one dtype share a program: plain, bf16, fp32, cap, both, unaligned, another cap.
    assert len(backend_of(Call(q, k, v, policy, 0.1, backend=backend))._programs) - before == 7


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("block_size", [64, 128])
def test_windows_are_exact_to_the_token(block_size, dim, backend):
    extra = {"sinks": torch.tensor(SINKS, device="cuda"), "softcap": 5.0}
    for q_len, kv_len, window in ((1500, 1800, 1), (1, 700, 64), (2500, 2500, 65), (64, 4097, 1000), (2000, 2000, 1024)):
        q, k, v = structured_qkv(1, q_len, kv_len, 4, 2, dim, torch.bfloat16, "cuda")
        sizes = {"block_size": block_size, "q_len": q_len, "kv_len": kv_len}
        band = BlockSelection.of_window(window, **sizes, q_heads=4, device="cuda")
        for selection in (band, random_selection(1, 4, q_len, kv_len, block_size, device="cuda")):
            for given in ({}, extra):
                options = {"window": window, **given}
                result = block_sparse_attention(q, k, v, selection, return_lse=True, backend=backend, **options)
                assert_accurate(*result, q, k, v, selection, **options)


@pytest.mark.parametrize(("dim", "value_dim"), [(192, 128), (64, 128), (128, 64), (72, 256), (128, 16), (192, 16), (256, 32)])
@pytest.mark.parametrize("block_size", [64, 128])
def test_values_of_another_dimension(block_size, dim, value_dim):
    asked = {"device": "cuda", "dtype": torch.bfloat16, "head_dim": dim, "value_dim": value_dim}
    hopper = torch.cuda.get_device_capability() == (9, 0) and HEAD_DIMS.get(dim) == value_dim
    assert explain(**asked).chosen == ("hopper" if hopper else "triton")
    for policy in (Mass(block_size=block_size), Stem(block_size=block_size)):
        q, k, v = structured_qkv(1, 1500, 1800, 4, 2, dim, torch.bfloat16, "cuda", value_dim=value_dim)
        selection = select_blocks(q, k, v, policy=policy)
        assert_selected(selection, q, k, v, policy, 1800)
        for _ in range(2):
            out, lse = stem_attention(q, k, v, policy=policy, dense_below=0, return_lse=True)
            assert_accurate(out, lse, q, k, v, selection)
        short = stem_attention(q, k, v, policy=policy)
        assert_accurate(short, None, q, k, v, random_selection(1, 4, 1500, 1800, block_size, density=1e9, device="cuda"))
    single = [
        make_qkv(1, *lengths, 4, 2, dim, torch.bfloat16, "cuda", i, value_dim=value_dim) for i, lengths in enumerate(LENGTHS)
    ]
    for page in (0, 64):
        policy = replace(policy, block_size=block_size)
        out = stem_attention_varlen(**pack(single, page), policy=policy, dense_below=0)
        for i, (low, high) in enumerate(pairwise(pack(single)["cu_seqlens_q"].tolist())):
            if low < high:
                assert_accurate(out[None, low:high], None, *single[i], select_blocks(*single[i], policy=policy))
