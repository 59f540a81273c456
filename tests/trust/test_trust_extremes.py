"""Numbers at the edges of their formats: as good as torch's own attention there."""

import math

import pytest
import torch
from tests.rigs import INTERPRETED

from stem_attention.testing import assert_accurate

HALF = torch.float16


def assert_right(rig, q, k, v, **options):
    selection = rig.lists(q, k, density=0.5)
    assert_accurate(*rig.attend(q, k, v, selection, **options), q, k, v, selection, **options)
    assert_accurate(*rig.whole(q, k, v, **options), q, k, v, rig.select(q, k, v, **options), **options)


@pytest.mark.parametrize(("size", "softcap"), [(1e4, None), (1e3, None), (30, None), (1e4, 30.0)])
def test_scores_of_ten_thousand(size, softcap, rig):
    q, k, v = rig.qkv(3.2, 4.1)
    q, k = q * (size / 4) ** 0.5, k * (size / 4) ** 0.5
    largest = float((q[:, :, 0].double() @ k[:, :, 0].double().mT).abs().max()) * rig.dim**-0.5
    assert 0.5 * size < largest < 5 * size
    assert_right(rig, q, k, v, softcap=softcap)


@pytest.mark.parametrize("flat", ["q", "k"])
def test_equal_scores_give_the_mean_of_what_is_seen(flat, rig):
    q, k, v = rig.qkv(2.2, 3.1)
    (q if flat == "q" else k).fill_(0.0 if flat == "q" else 1.0)
    assert_right(rig, q, k, v)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5])
def test_constant_values_come_back(value, rig):
    q, k, v = rig.qkv(3.2, 4.1)
    v.fill_(value)
    out, lse = rig.whole(q, k, v)
    assert lse.isfinite().all()
    torch.testing.assert_close(out, torch.full_like(out, value), rtol=8 * torch.finfo(rig.dtype).eps, atol=0)


def test_the_largest_numbers_of_fp16_do_not_overflow(rig):
    q, k, v = (x.to(HALF) for x in rig.qkv(3.2, 4.1))
    largest = torch.finfo(HALF).max
    signs = torch.where(v > 0, largest, -largest).to(HALF)
    assert_right(rig, q, k, signs)
    out, _ = rig.whole(q, k, torch.full_like(v, largest))
    assert torch.equal(out, torch.full_like(out, largest))
    assert_right(rig, q * 200, k * 200, v, scale=1e-5)  # products far beyond 65504
    # A GPU takes the exponent of one fused step, score * scale - maximum: beyond 2**23 its rounding alone overflows.
    most = largest if rig.device == "cpu" else 256.0
    out, lse = rig.whole(torch.full_like(q, most), torch.full_like(k, most), v)
    assert out.isfinite().all()
    assert lse.isfinite().all()


def test_one_huge_value_stays_finite(rig):
    q, k, v = rig.qkv(4.2, 4.2)
    huge = 1e30 if rig.dtype != HALF else 6e4
    v[0, rig.block + 3, 0, 2] = huge
    for magnitude in ("log", "none"):
        out, lse = rig.whole(q, k, v, policy=rig.stem(magnitude=magnitude))
        assert out.isfinite().all()
        assert lse.isfinite().all()
        assert float(out.abs().max()) <= huge * 1.01
    assert_right(rig, q, k, v)


def test_denormal_numbers_are_near_zero_and_never_nan(rig):
    q, k, v = rig.qkv(2.2, 3.1)
    tiny = float(torch.finfo(rig.dtype).smallest_normal) / 4
    out, lse = rig.whole(q, k, v * tiny)
    assert out.isfinite().all()
    assert float(out.abs().max()) <= 6 * tiny
    _, flat = rig.whole(q * tiny, k * tiny, v)
    zero = rig.whole(q * 0, k * 0, v)
    torch.testing.assert_close(flat, zero[1])
    assert lse.isfinite().all()


@pytest.mark.parametrize("scale", [0.0, 1e-30, -1.0, 1e4])
def test_any_finite_scale(scale, rig):
    assert_right(rig, *rig.qkv(2.2, 3.1), scale=scale)


def test_policies_at_the_edges_of_their_fields(rig):
    q, k, v = rig.qkv(5, 5.5)
    edges = [
        rig.stem(ratio_short=1e-9, ratio_long=1e-9, decay=1e-9, min_blocks=1, sink_blocks=0, tail_blocks=0),
        *[rig.stem(**{name: 1000}) for name in ("sink_blocks", "local_blocks", "tail_blocks", "min_blocks")],
        rig.stem(stride=1), rig.stem(stride=rig.block), rig.stem(beta=1e30),
        rig.stem(knee_tokens=1), rig.stem(knee_tokens=1 << 40),
        rig.mass(share=1e-30), rig.mass(share=1e30), rig.mass(spread=1e4), rig.mass(query_pool=rig.block, key_pool=rig.block),
        rig.mass(sink_blocks=0, tail_blocks=0), rig.mass(head_factors=[[1e-30, 1e30] * (q.shape[2] // 2)]),
    ]  # fmt: skip
    for policy in edges[:: 5 if INTERPRETED else 1]:
        assert_accurate(*rig.whole(q, k, v, policy=policy), q, k, v, rig.select(q, k, v, policy=policy))


def test_a_prompt_that_has_hardly_begun(rig):
    q, k, v = rig.qkv(1.1, 3.3)
    out, lse = rig.whole(q, k, v, prompt_len=1 << 20)
    assert math.isfinite(float(lse.sum()))
    assert out.isfinite().all()
    assert rig.select(q, k, v, policy=rig.stem(), prompt_len=1 << 14).density() == 1
