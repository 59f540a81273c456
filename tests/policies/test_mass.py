"""Keep by mass: the fast path against the twin that is written as the page says, and what the page promises."""

import math
from dataclasses import replace

import pytest
import torch
from tests.rigs import peaked

from stem_attention import Mass, Stem, select_blocks, stem_attention
from stem_attention.policies.mass import block_masses

SMALL = Mass(block_size=16, query_pool=4, key_pool=8, tail_blocks=1, local_blocks=1, share=1.5, spread=0.1)
FACTORS = (0.2, 1.0, 1.7, 6.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("policy", "batch", "q_len", "kv_len", "heads", "dim", "prompt_len"),
    [
        (SMALL, 2, 200, 200, (4, 2), 16, 200),
        (replace(SMALL, share=3.0, sink_blocks=0), 1, 90, 149, (2, 1), 32, 149),
        (replace(SMALL, query_pool=16, key_pool=16), 1, 45, 160, (3, 1), 24, 400),
        (replace(SMALL, query_pool=2, key_pool=1, tail_blocks=0, share=8.0), 1, 161, 161, (2, 2), 8, 161),
        (replace(SMALL, block_size=32, share=5.0), 1, 161, 161, (1, 1), 16, 161),
        (replace(SMALL, spread=0.0), 1, 161, 161, (2, 1), 16, 161),
        (replace(SMALL, head_factors=(FACTORS,)), 2, 90, 149, (4, 2), 16, 300),
    ],
    ids=["plain", "higher-share", "whole-blocks", "no-pools", "block-32", "means-alone", "factors"],
)
def test_both_ways_of_writing_it_keep_the_same(policy, batch, q_len, kv_len, heads, dim, prompt_len, dtype):
    q, k, v = peaked(batch, q_len, kv_len, *heads, dim, dtype=dtype)
    fast, plain = (
        select_blocks(q, k, v, policy=policy, prompt_len=prompt_len, backend=backend) for backend in ("torch", "reference")
    )
    assert torch.equal(fast.to_mask(), plain.to_mask())
    assert fast.density() < 1


def test_a_key_that_its_pools_mean_hides_is_noticed():
    q, k, v = (torch.zeros(1, 160, 1, 16) for _ in range(3))
    q[..., 0] = 4.0
    k[0, 40, 0, 0], k[0, 41, 0, 0] = 16.0, -16.0  # exp(16) for one key of block 2, in a pool whose mean is zero
    means, judged = (replace(SMALL, share=2.0, spread=spread)(q, k, v).to_mask()[0, 0] for spread in (0.0, 0.5))
    assert not means[5:9, 2].any()
    assert judged[5:9, 2].all()
    assert not judged[5:9, 3].any()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_each_head_keeps_what_its_own_share_keeps(backend):
    q, k, v = peaked(2, 90, 200, 4, 2, 16)
    chosen = select_blocks(q, k, v, policy=replace(SMALL, head_factors=(FACTORS,)), backend=backend).to_mask()
    kept = []
    for head, factor in enumerate(FACTORS):
        alone = select_blocks(q, k, v, policy=replace(SMALL, share=1.5 * factor), backend=backend).to_mask()
        assert torch.equal(chosen[:, head], alone[:, head])
        kept.append(int(alone[:, head].sum()))
    assert kept[0] > kept[2] > kept[3]  # or these factors show nothing


@pytest.mark.parametrize(
    "change",
    [{"share": 4.0}, {"spread": 0.2}, {"query_pool": 16}, {"key_pool": 16}, {"sink_blocks": 3}, {"local_blocks": 4},
     {"tail_blocks": 4}, {"block_size": 32}, {"head_factors": ((1.0, 4.0),)}],
    ids=str,
)  # fmt: skip
def test_every_field_changes_the_result(change):
    q, k, v = peaked(1, 330, 330, 2, 1, 16)
    policy = replace(SMALL, share=3.0)
    before, after = (stem_attention(q, k, v, policy=p, dense_below=0) for p in (policy, replace(policy, **change)))
    assert not torch.equal(before, after)


def test_masses_are_summed_in_fp64_on_a_cpu():
    """So that a chunk of a prompt estimates to the last bit what the whole does, whatever the shapes of its products."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        ((_, mass),) = block_masses(*peaked(1, 128, 128, 2, 1, 16, dtype=dtype)[:2], Mass(), 0.25)
        assert mass.dtype == torch.float64


LAYERS = ((1.0, 2.0, 0.5, 4.0), (3.0, 0.25, 1.5, 8.0))


@pytest.mark.parametrize(
    "value",
    [[], 2.0, "ab", {0: [1.0]}, [1.0, 2.0], [[1.0], []], [[1.0], None], [[1.0], [1.0, 2.0]],
     *([[1.0], [factor]] for factor in (0, -1.0, math.nan, math.inf, 10**400, "1", None, True, [1.0]))],
    ids=lambda value: repr(value)[:20],
)  # fmt: skip
def test_head_factors_are_rows_of_numbers_above_zero(value):
    with pytest.raises(ValueError, match=r"^head_factors: expected .+, got .+; .*stem-attention calibrate"):
        Mass(head_factors=value)


def test_a_layer_takes_its_row_and_all_else_of_the_policy():
    policy = Mass(share=3.0, head_factors=LAYERS)
    for layer, row in enumerate(LAYERS):
        own = policy.for_layer(layer)
        assert own == Mass(share=3.0, head_factors=(row,))
        assert own.for_layer(layer) is own
        assert policy.for_layer(layer) is own  # a graph of torch.compile cannot build one
        assert [own.head_share(head) for head in range(4)] == [3.0 * factor for factor in row]
    one_for_all = Mass(head_factors=LAYERS[:1])
    assert all(one_for_all.for_layer(layer) is one_for_all for layer in (-1, 0, 7))
    for layer in (-1, 2):
        with pytest.raises(ValueError, match=rf"^layer: expected one of the 2 layers of head_factors, got {layer}; calibrate"):
            policy.for_layer(layer)
    for policy in (Mass(), Stem()):
        assert policy.for_layer(7) is policy.for_layer(7, slice(2, 3)) is policy
    assert Mass(share=3.0).head_share(31) == 3.0


def test_a_rank_takes_the_factors_of_its_heads():
    for rows in (LAYERS, LAYERS[1:]):  # by layer, and one for all
        policy = Mass(share=3.0, head_factors=rows)
        for heads in (slice(1, 3), slice(2, None)):
            assert policy.for_layer(1, heads) == Mass(share=3.0, head_factors=[LAYERS[1][heads]])
        with pytest.raises(ValueError, match="^head_factors: expected "):
            policy.for_layer(1, slice(4, 8))


def test_a_policy_fits_the_models_that_it_was_made_for():
    for_all = Mass(head_factors=LAYERS[:1])
    for policy, layers in ((Mass(), 2), (Stem(), 2), (Mass(head_factors=LAYERS), 2), (for_all, 2), (for_all, 30)):
        policy.check_model(layers, 4)
    for layers, heads in ((3, 4), (1, 4), (2, 8), (2, 2)):
        said = rf"^head_factors: expected {layers} x {heads} .+, got 2 x 4; .*calibrate on this model"
        with pytest.raises(ValueError, match=said):
            Mass(head_factors=LAYERS).check_model(layers, heads)
    with pytest.raises(ValueError, match=r"got 1 x 4;"):
        for_all.check_model(30, 8)


@pytest.mark.parametrize(("factors", "got"), [(LAYERS, "2 x 4"), ((LAYERS[0][:3],), "1 x 3")], ids=["layers", "heads"])
def test_a_call_of_one_layer_takes_the_factors_of_one_layer(factors, got):
    Mass(head_factors=LAYERS[:1]).check_heads(4)
    policy, inputs = Mass(head_factors=factors), peaked(1, 9, 9, 4, 2, 8)
    said = rf"^policy: expected .*one layer and the 4 query heads of q, got {got} of them; pass policy.for_layer\(layer\)"
    for call in (lambda: policy.check_heads(4), lambda: policy(*inputs)):
        with pytest.raises(ValueError, match=said):
            call()
