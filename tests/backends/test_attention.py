"""Attention over a selection: against masked SDPA, against fp64, and one backend against the other."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_attention import BlockSelection, StemConfig, block_sparse_attention, select_blocks
from stem_attention.policies.dense import keep_everything
from stem_attention.testing import (
    LAYOUTS,
    error_against_sdpa,
    exact_attention,
    make_qkv,
    random_selection,
    structured_qkv,
    token_mask,
    worst_row_error,
)

BACKENDS = ("torch", "reference")
SPARSE = StemConfig(block_size=16, min_blocks=2, sink_blocks=1, local_blocks=1, tail_blocks=1, dense_below=0)


def masked_sdpa(q, k, v, mask, scale=None):
    """torch's own attention with a mask built by hand: shares no code with the backends."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2)


def mask_by_loops(selection):
    """Section 6 read aloud: query i sees key j when j <= i and the block of j is listed for the block of i."""
    size, start = selection.block_size, selection.kv_len - selection.q_len
    mask = torch.zeros(*selection.counts.shape[:2], selection.q_len, selection.kv_len, dtype=torch.bool)
    for b, per_head in enumerate(selection.indices.tolist()):
        for h, per_row in enumerate(per_head):
            for i in range(start, selection.kv_len):
                for block in per_row[i // size - start // size]:
                    if block >= 0:
                        mask[b, h, i - start, block * size : min((block + 1) * size, i + 1)] = True
    return mask


@st.composite
def problems(draw):
    """Lengths, heads and block sizes, with chunks that start anywhere in a block."""
    kv_len = draw(st.sampled_from([1, 2, 63, 64, 65, 127, 128, 129, 131, 257, 509]))
    q_len = kv_len if draw(st.booleans()) else draw(st.integers(1, kv_len))
    group = draw(st.sampled_from([1, 2, 4, 7, 8]))
    return {
        "batch": draw(st.integers(1, 2)),
        "q_len": q_len,
        "kv_len": kv_len,
        "q_heads": group * draw(st.integers(1, 2)),
        "group": group,
        "head_dim": draw(st.sampled_from([16, 64, 80, 96, 128, 256])),
        "block_size": draw(st.sampled_from([16, 64, 128])),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "seed": draw(st.integers(0, 99)),
    }


def build(problem, dtype, make=structured_qkv):
    kv_heads = problem["q_heads"] // problem["group"]
    return make(
        problem["batch"], problem["q_len"], problem["kv_len"], problem["q_heads"], kv_heads, problem["head_dim"],
        dtype=dtype, seed=problem["seed"], layout=problem["layout"],
    )  # fmt: skip


def ragged(problem):
    return random_selection(
        problem["batch"], problem["q_heads"], problem["q_len"], problem["kv_len"], problem["block_size"], seed=problem["seed"]
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_mask_and_attention_agree_with_a_mask_built_by_loops(backend):
    q, k, v = structured_qkv(2, 70, 101, 4, 2, 16, dtype=torch.float64)
    selection = random_selection(2, 4, 70, 101, 16)
    mask = mask_by_loops(selection)
    assert torch.equal(token_mask(selection), mask)
    out = block_sparse_attention(q, k, v, selection, backend=backend)
    assert worst_row_error(out, masked_sdpa(q, k, v, mask)) < 1e-12


@settings(max_examples=40)
@given(problems())
def test_ragged_selections_equal_masked_sdpa_in_fp64(problem):
    q, k, v = build(problem, torch.float64)
    selection = ragged(problem)
    out, lse = block_sparse_attention(q, k, v, selection, return_lse=True, backend="torch")
    assert worst_row_error(out, masked_sdpa(q, k, v, token_mask(selection))) < 1e-12
    exact, exact_lse = exact_attention(q, k, v, token_mask(selection))
    assert worst_row_error(out, exact) < 1e-12
    assert torch.allclose(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)  # the lse itself is fp32


@settings(max_examples=15)
@given(problems())
def test_backends_agree_on_ragged_selections_in_fp64(problem):
    q, k, v = build(problem, torch.float64)
    selection = ragged(problem)
    ours, our_lse = block_sparse_attention(q, k, v, selection, return_lse=True, backend="torch")
    theirs, their_lse = block_sparse_attention(q, k, v, selection, return_lse=True, backend="reference")
    assert worst_row_error(ours, theirs) < 1e-12
    assert torch.allclose(our_lse, their_lse, rtol=1e-6, atol=1e-6)


@settings(max_examples=40)
@given(problems())
def test_keeping_everything_equals_causal_sdpa_in_fp64(problem):
    q, k, v = build(problem, torch.float64)
    selection = keep_everything(q, k, problem["block_size"])
    causal = torch.ones(problem["q_len"], problem["kv_len"], dtype=torch.bool).tril(problem["kv_len"] - problem["q_len"])
    out, lse = block_sparse_attention(q, k, v, selection, return_lse=True)
    assert worst_row_error(out, masked_sdpa(q, k, v, causal)) < 1e-12
    assert torch.allclose(lse.double(), exact_attention(q, k, v, causal)[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 997, 1000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_keeping_everything_equals_causal_sdpa_in_fp32(length, backend):
    q, k, v = make_qkv(1, length, length, 4, 2, 64, seed=length)
    out = block_sparse_attention(q, k, v, keep_everything(q, k, 64), backend=backend)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    assert worst_row_error(out, masked_sdpa(q, k, v, causal)) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [make_qkv, structured_qkv])
def test_error_is_at_most_twice_that_of_sdpa(make, dtype, backend):
    q, k, v = make(1, 400, 500, 8, 2, 64, dtype=dtype, seed=3)
    for selection in (random_selection(1, 8, 400, 500, 64), select_blocks(q, k, v, config=SPARSE)):
        out = block_sparse_attention(q, k, v, selection, backend=backend)
        assert out.dtype == dtype
        ours, theirs = error_against_sdpa(out, q, k, v, token_mask(selection))
        assert 0 < ours <= 2 * theirs


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_backends_agree_on_stem_selections(layout, dtype, bound):
    q, k, v = structured_qkv(2, 150, 333, 6, 2, 80, dtype=dtype, seed=5, layout=layout)
    selection = select_blocks(q, k, v, config=SPARSE)
    ours, our_lse = block_sparse_attention(q, k, v, selection, return_lse=True, backend="torch")
    theirs, their_lse = block_sparse_attention(q, k, v, selection, return_lse=True, backend="reference")
    assert worst_row_error(ours, theirs) < bound
    assert our_lse.dtype == torch.float32
    assert torch.allclose(our_lse, their_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_given_scale_replaces_the_default(backend):
    q, k, v = structured_qkv(1, 64, 64, 2, 1, 16, dtype=torch.float64)
    selection = random_selection(1, 2, 64, 64, 16)
    for scale in (0, 0.3, 1, -0.5):
        out, lse = block_sparse_attention(q, k, v, selection, scale=scale, return_lse=True, backend=backend)
        exact, exact_lse = exact_attention(q, k, v, token_mask(selection), scale)
        assert worst_row_error(out, exact) < 1e-12
        assert torch.allclose(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_narrowest_selection_keeps_just_the_diagonal(backend):
    q, k, v = make_qkv(1, 40, 40, 2, 2, 16, dtype=torch.float64)
    lists = [[[[row] for row in range(3)]] * 2]
    selection = BlockSelection.from_lists(lists, block_size=16, q_len=40, kv_len=40)
    out, lse = block_sparse_attention(q, k, v, selection, return_lse=True, backend=backend)
    for start in (0, 16, 32):  # the first query of a block sees itself alone
        assert torch.allclose(out[:, start], v[:, start], rtol=1e-14, atol=0)
        own = (q[0, start] * k[0, start]).sum(-1) / 4
        assert torch.allclose(lse[0, :, start].double(), own, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_an_unselected_block_is_never_read_and_a_selected_one_shows(backend, poison):
    q, k, v = make_qkv(1, 128, 128, 2, 1, 16)
    lists = [[[[row] if row < 4 else [0, row] for row in range(8)], [[0, row] if row else [0] for row in range(8)]]]
    selection = BlockSelection.from_lists(lists, block_size=16, q_len=128, kv_len=128)
    clean = block_sparse_attention(q, k, v, selection, backend=backend)
    k_bad, v_bad = k.clone(), v.clone()
    k_bad[:, :16], v_bad[:, :16] = math.nan, poison
    out = block_sparse_attention(q, k_bad, v_bad, selection, backend=backend)
    assert torch.equal(out[:, 16:64, 0], clean[:, 16:64, 0])
    assert not out[:, 64:, 0].isfinite().any()
    assert not out[:, :, 1].isfinite().any()


def test_padding_of_the_last_block_adds_nothing():
    q, k, v = make_qkv(1, 100, 100, 2, 1, 16, dtype=torch.float64)
    selection = keep_everything(q, k, 64)
    roomy = torch.full((1, 128, 1, 16), math.nan, dtype=torch.float64)
    roomy_k, roomy_v = roomy.clone(), roomy.clone()
    roomy_k[:, :100], roomy_v[:, :100] = k, v
    out = block_sparse_attention(q, roomy_k[:, :100], roomy_v[:, :100], selection)
    assert torch.equal(out, block_sparse_attention(q, k, v, selection))
