"""On a GPU: attention over any lists is as good as torch's own attention in the same precision."""

import math

import pytest
import torch

from stem_attention import BlockSelection, StemConfig, block_sparse_attention, select_blocks, stem_attention
from stem_attention.backends.dense import dense_attention
from stem_attention.testing import (
    LAYOUTS,
    exact_attention,
    make_qkv,
    random_selection,
    relative_error,
    structured_qkv,
    token_mask,
)

from .common import SPARSE, assert_accurate, on_gpu

pytestmark = on_gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("block_size", [64, 128])
def test_every_head_dim_block_size_and_dtype(block_size, dim, dtype, backend):
    q, k, v = make_qkv(1, 1500, 1800, 4, 2, dim, dtype, "cuda")
    selection = random_selection(1, 4, 1500, 1800, block_size, device="cuda")
    out, lse = block_sparse_attention(q, k, v, selection, return_lse=True, backend=backend)
    assert_accurate(out, lse, q, k, v, selection)


@pytest.mark.parametrize("kv_len", [1, 63, 64, 65, 127, 129, 1000, 1009, 2053])
@pytest.mark.parametrize("block_size", [64, 128])
def test_every_length(block_size, kv_len, backend):
    for q_len in {1, (kv_len + 1) // 2, kv_len}:
        q, k, v = structured_qkv(2, q_len, kv_len, 2, 1, 128, torch.bfloat16, "cuda")
        selection = random_selection(2, 2, q_len, kv_len, block_size, device="cuda")
        assert_accurate(*block_sparse_attention(q, k, v, selection, return_lse=True, backend=backend), q, k, v, selection)


@pytest.mark.parametrize("group", [1, 4, 7, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_group_and_layout(layout, group, backend):
    q, k, v = make_qkv(2, 700, 900, 2 * group, 2, 64, torch.bfloat16, "cuda", layout=layout)
    selection = random_selection(2, 2 * group, 700, 900, 128, device="cuda")
    assert_accurate(*block_sparse_attention(q, k, v, selection, return_lse=True, backend=backend), q, k, v, selection)


def test_strides_that_no_descriptor_takes():
    wide = make_qkv(1, 900, 900, 4, 2, 72, torch.bfloat16, "cuda")
    odd = [torch.nn.functional.pad(x, (1, 4))[..., 1:73] for x in wide]  # rows of 77 numbers, the first at an odd address
    selection = random_selection(1, 4, 900, 900, 64, device="cuda")
    assert_accurate(*block_sparse_attention(*odd, selection, return_lse=True), *wide, selection)


@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_rows_of_any_count(density, backend):
    q, k, v = make_qkv(1, 4000, 4000, 4, 4, 128, torch.bfloat16, "cuda")
    selection = random_selection(1, 4, 4000, 4000, 128, density=density, device="cuda")
    assert_accurate(*block_sparse_attention(q, k, v, selection, return_lse=True, backend=backend), q, k, v, selection)


def test_large_logits_neither_overflow_nor_vanish(backend):
    q, k, v = make_qkv(1, 1000, 1000, 2, 1, 128, torch.bfloat16, "cuda")
    q, k = q * 12, k * 12
    selection = random_selection(1, 2, 1000, 1000, 64, device="cuda")
    out, lse = block_sparse_attention(q, k, v, selection, return_lse=True, backend=backend)
    assert lse.isfinite().all()
    assert_accurate(out, None, q, k, v, selection)


@pytest.mark.parametrize("config", [SPARSE, StemConfig.paper(dense_below=0), StemConfig.angelslim(dense_below=0)])
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize(("q_len", "kv_len", "prompt_len"), [(9001, 9001, 9001), (3000, 9001, 9001), (2560, 7680, 12000)])
def test_the_whole_is_selection_and_attention(q_len, kv_len, prompt_len, block_size, config, backend):
    config = StemConfig.from_dict({**config.to_dict(), "block_size": block_size})
    q, k, v = structured_qkv(1, q_len, kv_len, 4, 2, 128, torch.bfloat16, "cuda")
    out, lse = stem_attention(q, k, v, config=config, prompt_len=prompt_len, return_lse=True, backend=backend)
    selection = select_blocks(q, k, v, config=config, prompt_len=prompt_len)
    apart, apart_lse = block_sparse_attention(q, k, v, selection, return_lse=True, backend=backend)
    assert torch.equal(out, apart)
    assert torch.equal(lse, apart_lse)
    assert torch.equal(stem_attention(q, k, v, config=config, prompt_len=prompt_len, backend=backend), out)


def test_rows_that_may_keep_everything_but_overlap_do_not_lose_blocks(backend):
    """With forced blocks on top, a chunk's rows may keep fewer blocks than their budget, and then need a list."""
    config = StemConfig.paper(forced="extra", dense_below=0, ratio_short=0.4, ratio_long=0.4, sink_blocks=6, local_blocks=6)
    q, k, v = structured_qkv(1, 512, 3072, 2, 1, 64, torch.bfloat16, "cuda")
    selection = select_blocks(q, k, v, config=config, prompt_len=6400)
    out = stem_attention(q, k, v, config=config, prompt_len=6400, backend=backend)
    assert torch.equal(out, block_sparse_attention(q, k, v, selection, backend=backend))


def test_short_prompts_run_dense(backend):
    q, k, v = make_qkv(1, 500, 500, 4, 2, 128, torch.bfloat16, "cuda")
    config = StemConfig(dense_below=2048)
    assert torch.equal(stem_attention(q, k, v, config=config, backend=backend), dense_attention(q, k, v, 128**-0.5))
    out, lse = stem_attention(q, k, v, config=config, return_lse=True, backend=backend)
    everything = random_selection(1, 4, 500, 500, 128, density=1e9, device="cuda")
    assert_accurate(out, lse, q, k, v, everything)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_blocks_that_are_not_kept_are_not_read(poison, backend):
    q, k, v = make_qkv(1, 2048, 2048, 2, 1, 128, torch.bfloat16, "cuda")
    lists = [[[[row] if row < 4 else [0, row] for row in range(16)]] * 2]
    selection = BlockSelection.from_lists(lists, block_size=128, q_len=2048, kv_len=2048, device="cuda")
    clean = block_sparse_attention(q, k, v, selection, backend=backend)
    k[:, 128:256], v[:, 128:256] = poison, math.nan
    out = block_sparse_attention(q, k, v, selection, backend=backend)
    assert torch.equal(out[:, :128], clean[:, :128])
    assert torch.equal(out[:, 256:], clean[:, 256:])
    assert out[:, 128:256].isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_lies_behind_the_last_key_is_not_read(layout, backend):
    q, k, v = make_qkv(1, 1000, 1000, 2, 1, 128, torch.bfloat16, "cuda", layout=layout)
    selection = random_selection(1, 2, 1000, 1000, 128, device="cuda")
    clean = block_sparse_attention(q, k, v, selection, backend=backend)
    roomy_k, roomy_v = (x.new_full((1, 1024, 1, 128), math.nan) for x in (k, v))
    roomy_k[:, :1000], roomy_v[:, :1000] = k, v
    assert torch.equal(block_sparse_attention(q, roomy_k[:, :1000], roomy_v[:, :1000], selection, backend=backend), clean)


def test_a_wild_selection_stays_inside_the_keys(backend):
    q, k, v = make_qkv(1, 1000, 1000, 2, 1, 128, torch.bfloat16, "cuda")
    good = random_selection(1, 2, 1000, 1000, 128, device="cuda")
    for factor in (1 << 20, -(1 << 20)):
        wild = BlockSelection(torch.full_like(good.indices, factor), torch.full_like(good.counts, factor), 128, 1000, 1000)
        block_sparse_attention(q, k, v, wild, backend=backend)
    torch.cuda.synchronize()  # an access outside would have ended the context


def test_fp32_on_a_gpu_runs_without_triton_and_agrees():
    q, k, v = structured_qkv(1, 3000, 3000, 4, 2, 64, torch.float32, "cuda")
    selection = select_blocks(q, k, v, config=SPARSE)
    exact, _ = exact_attention(q, k, v, token_mask(selection))
    assert relative_error(block_sparse_attention(q, k, v, selection), exact) < 1e-5
    assert relative_error(stem_attention(q, k, v, config=SPARSE), exact) < 1e-5
