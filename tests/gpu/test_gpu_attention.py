"""On a GPU: attention over any lists is as good as torch's own attention in the same precision."""

from dataclasses import replace

import pytest
import torch

from stem_attention import Mass, Stem, block_sparse_attention, select_blocks, stem_attention
from stem_attention.backends.dense import dense_attention
from stem_attention.testing import (
    LAYOUTS,
    assert_accurate,
    exact_attention,
    make_qkv,
    random_selection,
    relative_error,
    structured_qkv,
    token_mask,
)

from .common import on_gpu, random_qkv

pytestmark = on_gpu


def assert_right(q, k, v, selection, backend="auto"):
    result = block_sparse_attention(q, k, v, selection, return_lse=True, backend=backend)
    assert_accurate(*result, q, k, v, selection)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("block_size", [64, 128])
def test_every_head_dim_block_size_and_dtype(block_size, dim, dtype, backend):
    q, k, v = make_qkv(1, 1500, 1800, 4, 2, dim, dtype, "cuda")
    assert_right(q, k, v, random_selection(1, 4, 1500, 1800, block_size, device="cuda"), backend)


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("block_size", [64, 128])
def test_of_many_numbers_the_error_is_at_most_a_tenth_above_that_of_sdpa(block_size, dim, backend):
    """The error budget of a row leaves room for chance; the mean of a million errors is no matter of chance."""
    q, k, v = random_qkv(1, 8000, 8000, 4, 2, dim)
    selection = random_selection(1, 4, 8000, 8000, block_size, density=0.2, device="cuda")
    mask = token_mask(selection)
    exact, _ = exact_attention(q, k, v, mask)
    repeated = (x.transpose(1, 2).repeat_interleave(2, 1) for x in (k, v))
    sdpa = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), *repeated, attn_mask=mask).transpose(1, 2)
    out = block_sparse_attention(q, k, v, selection, backend=backend)
    assert relative_error(out, exact) <= 1.1 * relative_error(sdpa, exact)


@pytest.mark.parametrize("kv_len", [1, 63, 64, 65, 127, 129, 1000, 1009, 2053])
@pytest.mark.parametrize("block_size", [64, 128])
def test_every_length(block_size, kv_len, backend):
    for q_len in {1, (kv_len + 1) // 2, kv_len}:
        q, k, v = structured_qkv(2, q_len, kv_len, 2, 1, 128, torch.bfloat16, "cuda")
        assert_right(q, k, v, random_selection(2, 2, q_len, kv_len, block_size, device="cuda"), backend)


@pytest.mark.parametrize("group", [1, 4, 7, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_group_and_layout(layout, group, backend):
    q, k, v = make_qkv(2, 700, 900, 2 * group, 2, 64, torch.bfloat16, "cuda", layout=layout)
    assert_right(q, k, v, random_selection(2, 2 * group, 700, 900, 128, device="cuda"), backend)


@pytest.mark.parametrize("dim", [64, 72, 128, 256])
def test_strides_that_no_descriptor_and_no_copy_engine_takes(dim):
    wide = make_qkv(1, 900, 900, 4, 2, dim, torch.bfloat16, "cuda")
    odd = [torch.nn.functional.pad(x, (1, 4))[..., 1:-4] for x in wide]  # rows of dim + 5 numbers, the first at an odd address
    assert_right(*odd, random_selection(1, 4, 900, 900, 128, device="cuda"))


@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_rows_of_any_count(density, backend):
    q, k, v = make_qkv(1, 4000, 4000, 4, 4, 128, torch.bfloat16, "cuda")
    assert_right(q, k, v, random_selection(1, 4, 4000, 4000, 128, density=density, device="cuda"), backend)


@pytest.mark.parametrize("policy", [Stem(), Stem.paper(), Stem.angelslim(), Mass()], ids=["stem", "paper", "angelslim", "mass"])
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize(("q_len", "kv_len", "prompt_len"), [(9001, 9001, 9001), (3000, 9001, 9001), (2560, 7680, 12000)])
def test_the_whole_is_selection_and_attention(q_len, kv_len, prompt_len, block_size, policy, backend):
    options = {"policy": replace(policy, block_size=block_size), "prompt_len": prompt_len, "backend": backend}
    q, k, v = structured_qkv(1, q_len, kv_len, 4, 2, 128, torch.bfloat16, "cuda")
    out, lse = stem_attention(q, k, v, dense_below=0, return_lse=True, **options)
    apart = block_sparse_attention(q, k, v, select_blocks(q, k, v, **options), return_lse=True, backend=backend)
    assert torch.equal(out, apart[0])
    assert torch.equal(lse, apart[1])
    assert torch.equal(stem_attention(q, k, v, dense_below=0, **options), out)


def test_rows_that_may_keep_everything_but_overlap_do_not_lose_blocks(backend):
    """With forced blocks on top, a chunk's rows may keep fewer blocks than their budget, and then need a list."""
    policy = Stem.paper(forced="extra", ratio_short=0.4, ratio_long=0.4, sink_blocks=6, local_blocks=6)
    q, k, v = structured_qkv(1, 512, 3072, 2, 1, 64, torch.bfloat16, "cuda")
    selection = select_blocks(q, k, v, policy=policy, prompt_len=6400)
    out = stem_attention(q, k, v, policy=policy, dense_below=0, prompt_len=6400, backend=backend)
    assert torch.equal(out, block_sparse_attention(q, k, v, selection, backend=backend))


def test_short_prompts_run_dense(backend):
    q, k, v = make_qkv(1, 500, 500, 4, 2, 128, torch.bfloat16, "cuda")
    options = {"dense_below": 2048, "backend": backend}
    assert torch.equal(stem_attention(q, k, v, **options), dense_attention(q, k, v, 128**-0.5))
    everything = random_selection(1, 4, 500, 500, 128, density=1e9, device="cuda")
    assert_accurate(*stem_attention(q, k, v, return_lse=True, **options), q, k, v, everything)


def test_fp32_on_a_gpu_runs_without_triton_and_agrees():
    q, k, v = structured_qkv(1, 3000, 3000, 4, 2, 64, torch.float32, "cuda")
    selection = select_blocks(q, k, v)
    exact, _ = exact_attention(q, k, v, token_mask(selection))
    assert relative_error(block_sparse_attention(q, k, v, selection), exact) < 1e-5
    assert relative_error(stem_attention(q, k, v, dense_below=0), exact) < 1e-5
