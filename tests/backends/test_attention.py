"""Attention over a selection: against masked SDPA, against fp64, and one backend against the other."""

import math
from dataclasses import replace

import pytest
import torch

from stem_attention import BlockSelection, Mass, Stem, block_sparse_attention, select_blocks, stem_attention
from stem_attention.backends.dense import dense_attention
from stem_attention.policies.patterns import keep_everything
from stem_attention.testing import (
    LAYOUTS,
    assert_accurate,
    error_against_sdpa,
    exact_attention,
    make_qkv,
    random_selection,
    structured_qkv,
    token_mask,
    worst_row_error,
)

BACKENDS = ("torch", "reference")
SPARSE = Stem(block_size=16, min_blocks=2, sink_blocks=1, local_blocks=1, tail_blocks=1)


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_mask_and_attention_agree_with_a_mask_built_by_loops(backend):
    q, k, v = structured_qkv(2, 70, 101, 4, 2, 16, dtype=torch.float64)
    selection = random_selection(2, 4, 70, 101, 16)
    mask = mask_by_loops(selection)
    assert torch.equal(token_mask(selection), mask)
    out = block_sparse_attention(q, k, v, selection, backend=backend)
    assert worst_row_error(out, masked_sdpa(q, k, v, mask)) < 1e-12


def assert_equals_masked_sdpa(q, k, v, selection, mask, scale=None):
    exact, exact_lse = exact_attention(q, k, v, mask, scale)
    for name in BACKENDS:
        out, lse = block_sparse_attention(q, k, v, selection, return_lse=True, backend=name, scale=scale)
        assert worst_row_error(out, masked_sdpa(q, k, v, mask, scale)) < 1e-12
        assert worst_row_error(out, exact) < 1e-12
        assert torch.allclose(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)  # the lse itself is fp32


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("q_len", "kv_len", "heads", "dim", "size"),
    [
        (1, 1, (1, 1), 16, 16),
        (2, 129, (2, 2), 64, 128),
        (63, 63, (7, 1), 80, 64),
        (65, 128, (4, 1), 128, 64),
        (100, 257, (8, 2), 16, 16),
        (131, 131, (2, 1), 256, 128),
        (300, 509, (4, 4), 96, 64),
    ],
)
def test_attention_equals_masked_sdpa_in_fp64(q_len, kv_len, heads, dim, size, layout):
    """More shapes: tests/fuzz/test_fuzz.py."""
    q, k, v = structured_qkv(2, q_len, kv_len, *heads, dim, dtype=torch.float64, layout=layout)
    selection = random_selection(2, heads[0], q_len, kv_len, size)
    assert_equals_masked_sdpa(q, k, v, selection, token_mask(selection))
    causal = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
    assert_equals_masked_sdpa(q, k, v, keep_everything(q, k, size), causal)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [make_qkv, structured_qkv])
def test_error_is_at_most_twice_that_of_sdpa(make, dtype, backend):
    q, k, v = make(1, 400, 500, 8, 2, 64, dtype=dtype, seed=3)
    for selection in (random_selection(1, 8, 400, 500, 64), select_blocks(q, k, v, policy=SPARSE)):
        out = block_sparse_attention(q, k, v, selection, backend=backend)
        assert out.dtype == dtype
        ours, theirs = error_against_sdpa(out, q, k, v, token_mask(selection))
        assert 0 < ours <= 2 * theirs


@pytest.mark.parametrize("scale", [0, 0.3, 1, -0.5])
def test_a_given_scale_replaces_the_default(scale):
    q, k, v = structured_qkv(1, 64, 64, 2, 1, 16, dtype=torch.float64)
    selection = random_selection(1, 2, 64, 64, 16)
    assert_equals_masked_sdpa(q, k, v, selection, token_mask(selection), scale)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_sink_is_a_key_of_a_given_score_without_a_value(dtype, backend):
    """Beside a call that has such a key: zero, of value zero, seen by every query."""
    q, k, v = structured_qkv(2, 70, 101, 4, 2, 16, dtype=dtype)
    sinks, selection = torch.tensor([0.5, -math.inf, 9.0, -3.0], dtype=dtype), random_selection(2, 4, 70, 101, 16)
    causal = torch.ones(70, 101, dtype=torch.bool).tril(31)
    for mask, run in (
        (token_mask(selection), lambda **options: block_sparse_attention(q, k, v, selection, **options)),
        (causal, lambda **options: stem_attention(q, k, v, policy=SPARSE, dense_below=1000, **options)),
    ):
        bias = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -math.inf).expand(2, 4, 70, 101)
        bias = torch.cat([bias, sinks[:, None, None].expand(2, 4, 70, 1)], 3)
        expected = masked_sdpa(q, *(torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v)), bias)
        out, lse = run(sinks=sinks, return_lse=True, backend=backend)
        _, plain = run(return_lse=True, backend=backend)
        assert worst_row_error(out, expected) < (1e-12 if dtype == torch.float64 else 1e-5)
        assert torch.equal(run(sinks=sinks, backend=backend), out)
        torch.testing.assert_close(lse, torch.logaddexp(plain, sinks[:, None].float()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("scale", [0.25, -1.0])
def test_a_soft_cap_bounds_the_scores_of_attention_and_of_the_estimate(scale, backend):
    """Beside torch's attention with the capped scores as a mask over queries of zero."""
    q, k, v = structured_qkv(1, 90, 130, 2, 2, 16, dtype=torch.float64)
    options = {"scale": scale, "softcap": 0.3, "backend": backend}
    scores = (q.transpose(1, 2) @ k.transpose(1, 2).mT) * scale
    bias = 0.3 * torch.tanh(scores / 0.3)
    causal = torch.ones(90, 130, dtype=torch.bool).tril(40)
    for policy in (replace(SPARSE, beta=2.0, min_blocks=5), Mass(block_size=16, query_pool=4, key_pool=4, share=1.5)):
        selection = select_blocks(q, k, v, policy=policy, **options)
        assert not torch.equal(selection.to_mask(), select_blocks(q, k, v, policy=policy, scale=scale).to_mask())
        sparse = stem_attention(q, k, v, policy=policy, dense_below=0, **options)
        dense = stem_attention(q, k, v, policy=policy, dense_below=1000, **options)
        for out, mask in ((sparse, token_mask(selection)), (dense, causal)):
            expected = masked_sdpa(torch.zeros_like(q), k, v, bias.masked_fill(~mask, -math.inf))
            assert worst_row_error(out, expected) < 1e-12
        assert torch.equal(block_sparse_attention(q, k, v, selection, **options), sparse)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize(("dim", "value_dim"), [(24, 16), (16, 40), (8, 5)])
def test_values_of_another_dimension_than_keys(dim, value_dim, backend):
    q, k, v = structured_qkv(2, 70, 101, 4, 2, dim, dtype=torch.float64, value_dim=value_dim, layout="fused")
    for policy in (replace(SPARSE, min_blocks=4), Mass(block_size=16, key_pool=16)):
        selection = select_blocks(q, k, v, policy=policy, backend=backend)
        expected = masked_sdpa(q, k, v, token_mask(selection), dim**-0.5)
        out = stem_attention(q, k, v, policy=policy, dense_below=0, backend=backend)
        assert out.shape == (2, 70, 4, value_dim)
        assert worst_row_error(out, expected) < 1e-12
        assert torch.equal(block_sparse_attention(q, k, v, selection, backend=backend), out)
        causal = torch.ones(70, 101, dtype=torch.bool).tril(31)
        short, _ = (stem_attention(q, k, v, policy=policy, return_lse=lse, backend=backend) for lse in (False, True))
        assert worst_row_error(short, masked_sdpa(q, k, v, causal, dim**-0.5)) < 1e-12


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 18, 33, 100, 101, 5000])
def test_a_window_is_exact_to_the_token(window, backend):
    """Over the blocks that it touches, and over those that happen to be kept, with the other forms."""
    q, k, v = structured_qkv(2, 70, 101, 4, 2, 16, dtype=torch.float64)
    keys = torch.arange(101)
    seen = (keys <= keys[31:, None]) & (keys > keys[31:, None] - window)
    band = BlockSelection.of_window(window, block_size=16, q_len=70, kv_len=101, batch=2, q_heads=4)
    out, lse = block_sparse_attention(q, k, v, band, window=window, return_lse=True, backend=backend)
    assert worst_row_error(out, masked_sdpa(q, k, v, seen, 0.25)) < 1e-12
    assert_accurate(out, lse, q, k, v, band, window=window)
    some = random_selection(2, 4, 70, 101, 16)
    extra = {"sinks": torch.tensor([0.5, -math.inf, 9.0, -3.0], dtype=torch.float64), "softcap": 3.0}
    for given in ({}, extra):
        out, lse = block_sparse_attention(q, k, v, some, window=window, return_lse=True, backend=backend, **given)
        assert_accurate(out, lse, q, k, v, some, window=window, **given)
    if window >= 101:
        for wide in (None, 2**70):
            assert torch.equal(out, block_sparse_attention(q, k, v, some, window=wide, backend=backend, **extra))


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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (1, 50), (17, 50), (50, 50), (129, 129), (100, 129)])
def test_dense_attention_aligns_queries_to_the_end_of_the_keys(q_len, kv_len, layout):
    q, k, v = structured_qkv(2, q_len, kv_len, 6, 2, 16, dtype=torch.float64, layout=layout)
    causal = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
    assert worst_row_error(dense_attention(q, k, v, 0.3), exact_attention(q, k, v, causal, 0.3)[0]) < 1e-12
    assert dense_attention(q.half(), k.half(), v.half(), 0.3).dtype == torch.float16
