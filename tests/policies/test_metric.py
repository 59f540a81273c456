"""Output-Aware Metric: the factorised route and the value terms against their definitions."""

import math
from itertools import product
from statistics import mean, stdev

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_attention.policies.metric import group_sums, magnitude


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@given(st.integers(1, 70), st.integers(0, 40), st.sampled_from([(16, 4), (16, 16), (8, 1), (12, 3)]))
@settings(max_examples=60)
def test_group_sums_equal_a_plain_loop_wherever_the_tokens_start(length, start, sizes):
    block_size, stride = sizes
    x = normal(2, length, 2, 3)
    first, end = start // block_size, -(-(start + length) // block_size)
    expected = torch.zeros(2, 2, end - first, stride, 3, dtype=torch.float64)
    for i in range(length):
        expected[:, :, (start + i) // block_size - first, (start + i) % stride] += x[:, i]
    torch.testing.assert_close(group_sums(x, start, block_size, stride), expected)


@pytest.mark.parametrize(("block_size", "stride"), [(16, 4), (16, 16), (32, 8), (8, 1)])
def test_factorised_route_is_the_mean_of_the_strided_antidiagonals(block_size, stride):
    """Mean over the pairs of a block pair that lie on the tiles' antidiagonals, for every block pair."""
    q, k = normal(1, 2 * block_size, 1, 5), normal(1, 3 * block_size, 1, 5, seed=1)
    q_sums = group_sums(q, 0, block_size, stride)[0, 0].flip(1).flatten(1)
    k_sums = group_sums(k, 0, block_size, stride)[0, 0].flatten(1)
    route = q_sums @ k_sums.T / (block_size * block_size / stride)
    products = q[0, :, 0] @ k[0, :, 0].T
    for i, j in product(range(2), range(3)):
        pair = products[i * block_size : (i + 1) * block_size, j * block_size : (j + 1) * block_size]
        tiles = pair.unflatten(0, (-1, stride)).unflatten(2, (-1, stride)).transpose(1, 2)
        antidiagonals = tiles.flip(3).diagonal(dim1=2, dim2=3)
        torch.testing.assert_close(route[i, j], antidiagonals.mean())


def norms(v):
    """Of every sequence and head: where it is, and the norms of its tokens in plain Python."""
    for b, head in product(range(v.shape[0]), range(v.shape[2])):
        yield (b, head), [math.sqrt(sum(float(x) ** 2 for x in token)) for token in v[b, :, head]]


@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 75])
@pytest.mark.parametrize("size", [0.1, 3.0])
def test_log_magnitude_is_the_largest_positive_log_norm_of_the_block(length, size):
    v = size * normal(2, length, 2, 4)
    got = magnitude(v, "log", 16, 4)
    for place, lengths in norms(v):
        expected = [max(0.0, *map(math.log, lengths[i : i + 16])) for i in range(0, length, 16)]
        assert got[place].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 16, 17, 64, 75])
def test_zscore_magnitude_is_the_public_codes_statistic(length):
    v = 3 * normal(2, length, 2, 4)
    got = magnitude(v, "zscore", 16, 4)
    for place, lengths in norms(v):
        u = [math.log(1e-6 + max(lengths[i : i + 4])) for i in range(0, length, 4)]
        whole = u[: max(length // 4, 1)]
        spread = stdev(whole) if len(whole) > 1 else 0.0
        z = [max(0.0, (x - mean(whole)) / (spread + 1e-6)) for x in u]
        expected = [sum(z[i : i + 4]) / 4 for i in range(0, len(z), 4)]
        assert got[place].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_summed_and_measured_in_fp32(dtype):
    x = (3 * normal(1, 200, 2, 64)).to(dtype)
    for start in (0, 5):
        sums = group_sums(x, start, 128, 16)
        assert sums.dtype == torch.float32
        torch.testing.assert_close(sums.double(), group_sums(x.double(), start, 128, 16), rtol=0, atol=2e-5)
    for kind in ("log", "zscore"):
        values = magnitude(x, kind, 128, 16)
        assert values.dtype == torch.float32
        torch.testing.assert_close(values.double(), magnitude(x.double(), kind, 128, 16), rtol=3e-6, atol=3e-6)


def test_fp16_norms_do_not_overflow():
    v = torch.full((1, 16, 1, 64), 6e4, dtype=torch.float16)
    assert magnitude(v, "log", 16, 4).item() == pytest.approx(math.log(float(v[0, 0, 0, 0]) * 8), rel=1e-6)


def test_without_a_magnitude_every_block_has_0():
    assert magnitude(normal(2, 33, 3, 4, dtype=torch.float32), "none", 16, 4).equal(torch.zeros(2, 3, 3))


def test_nan_values_stay_visible():
    v = normal(1, 64, 1, 4)
    v[0, 20, 0, 1] = math.nan
    assert magnitude(v, "log", 16, 4).isnan().tolist() == [[[False, True, False, False]]]
