"""The shipped input makers and error measures."""

import math

import pytest
import torch

from stem_attention import block_sparse_attention, stem_attention, stem_attention_varlen
from stem_attention.testing import (
    LAYOUTS,
    assert_accurate,
    error_against_sdpa,
    exact_attention,
    make_qkv,
    pack,
    random_selection,
    relative_error,
    structured_qkv,
    worst_row_error,
)


@pytest.mark.parametrize("make", [make_qkv, structured_qkv])
def test_layouts_hold_the_same_numbers_in_other_places(make):
    plain = make(2, 30, 50, 6, 2, 16, seed=4)
    assert [tuple(x.shape) for x in plain] == [(2, 30, 6, 16), (2, 50, 2, 16), (2, 50, 2, 16)]
    for layout in LAYOUTS:
        laid_out = make(2, 30, 50, 6, 2, 16, seed=4, layout=layout)
        assert all(torch.equal(x, y) for x, y in zip(laid_out, plain, strict=True))
        assert all(x.stride(-1) == 1 for x in laid_out)
        assert all(x.is_contiguous() for x in laid_out) == (layout == "bshd")
    assert not torch.equal(make(2, 30, 50, 6, 2, 16, seed=5)[0], plain[0])
    with pytest.raises(ValueError, match=r"^layout: expected one of bshd, bhsd, fused, got 'sbhd'"):
        make(2, 30, 50, 6, 2, 16, layout="sbhd")


def test_structured_inputs_are_far_from_flat_and_random_ones_are_not():
    def share_of_the_top_tenth(q, k, v):
        scores = q[0, :, 0] @ k[0, :, 0].T / 64**0.5
        return scores.softmax(-1).topk(50, -1).values.sum(-1).mean().item()

    assert share_of_the_top_tenth(*structured_qkv(1, 500, 500, 1, 1, 64)) > 0.7
    assert share_of_the_top_tenth(*make_qkv(1, 500, 500, 1, 1, 64)) < 0.5
    norms = structured_qkv(1, 500, 500, 1, 1, 64)[2].norm(dim=-1)
    assert norms.max() > 100 * norms.min()


def test_random_selections_are_valid_ragged_and_as_dense_as_asked():
    sparse, full = (random_selection(2, 4, 500, 700, 16, density=d, seed=1) for d in (0.2, 1.0))
    for selection in (sparse, full):
        selection.validate()
        assert (selection.q_len, selection.kv_len, selection.block_size) == (500, 700, 16)
    assert len(sparse.counts[0, :, -1].unique()) > 1
    assert len(sparse.counts[0, 0].unique()) > 1
    assert 0.05 < sparse.density() < 0.4 < full.density()
    assert torch.equal(sparse.indices, random_selection(2, 4, 500, 700, 16, density=0.2, seed=1).indices)


def test_exact_attention_is_causal_attention_under_a_causal_mask():
    q, k, v = structured_qkv(1, 40, 40, 4, 2, 16)
    causal = torch.ones(40, 40, dtype=torch.bool).tril()
    out, lse = exact_attention(q, k, v, causal)
    sdpa = torch.nn.functional.scaled_dot_product_attention(
        *(x.double().transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    assert out.dtype == lse.dtype == torch.float64
    assert worst_row_error(out, sdpa.transpose(1, 2)) < 1e-12
    assert torch.allclose(lse[0, :, 0], (q[0, 0].double() * k[0, 0, [0, 0, 1, 1]].double()).sum(-1) / 4)
    ours, theirs = error_against_sdpa(out, q, k, v, causal)
    assert ours == 0 < theirs < 1e-4


def test_relative_error_measures_what_it_says():
    ref = torch.tensor([[3.0, 4.0], [0.0, 0.03]])
    assert relative_error(ref, ref) == worst_row_error(ref, ref) == 0
    out = ref + torch.tensor([[0.0, 0.0], [0.0, 0.03]])
    assert relative_error(out, ref) == pytest.approx(0.03 / 5, rel=1e-3)
    assert worst_row_error(out, ref) == pytest.approx(1)
    assert math.isnan(relative_error(ref * math.nan, ref))
    assert math.isnan(worst_row_error(ref * math.nan, ref))
    assert relative_error(ref[:0], ref[:0]) == worst_row_error(ref[:0], ref[:0]) == 0


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda out, lse: (out.index_fill(1, torch.tensor([7]), 0.01), lse), "the worst row is off by"),
        (lambda out, lse: (out.masked_fill(torch.arange(300)[:, None, None] == 5, torch.nan), lse), "not finite"),
        (lambda out, lse: (out.half(), lse), "out is torch.float16"),
        (lambda out, lse: (out[:, 1:], lse), r"out is .* \(1, 299, 2, 16\)"),
        (lambda out, lse: (out, lse * 1.0001), "lse is off by"),
        (lambda out, lse: (out, lse[:, 1:]), r"lse is \(1, 1, 300\)"),
    ],
)
def test_wrong_attention_is_refused(spoil, told):
    q, k, v = make_qkv(1, 300, 300, 2, 1, 16)
    selection = random_selection(1, 2, 300, 300, 16)
    out, lse = block_sparse_attention(q, k, v, selection, return_lse=True)
    assert_accurate(out, lse, q, k, v, selection)
    assert_accurate(out, None, q, k, v, selection)
    with pytest.raises(AssertionError, match=told):
        assert_accurate(*spoil(out, lse), q, k, v, selection)


@pytest.mark.parametrize("page_size", [0, 1, 16])
def test_a_packed_batch_holds_its_sequences(page_size):
    sequences = [make_qkv(1, q_len, kv_len, 4, 2, 16, seed=q_len) for q_len, kv_len in ((30, 50), (0, 10), (20, 20))]
    batch = pack(sequences, page_size)
    assert (batch["max_seqlen_q"], batch["max_seqlen_k"]) == (30, 50)
    assert (batch["page_table"] is None) == (page_size == 0)
    if page_size:
        assert batch["k"].isnan().any()
    out = stem_attention_varlen(**batch)
    assert torch.equal(out, torch.cat([stem_attention(*sequences[i])[0] for i in (0, 2)]))
