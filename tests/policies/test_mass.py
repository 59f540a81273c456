"""Keep by mass: the fast path against the twin that is written as the page says, and what the page promises."""

from dataclasses import replace

import pytest
import torch

from stem_attention import StemConfig, block_sparse_attention, select_blocks, stem_attention
from stem_attention.policies import Mass, Stem, mass, policy_of
from stem_attention.policies.budget import row_budgets
from stem_attention.policies.mass import block_masses, pool, pool_variances
from stem_attention.policies.oracle import block_mass
from stem_attention.testing import make_qkv

SMALL = StemConfig.mass(
    block_size=16, query_pool=4, key_pool=8, tail_blocks=1, local_blocks=1, share=1.5, spread=0.1, dense_below=0
)
FACTORS = (0.2, 1.0, 1.7, 6.0)


def peaked(batch, q_len, kv_len, heads, dim, dtype=torch.float32):
    """Queries and keys whose attention is far from even, so that something is dropped."""
    q, k, v = make_qkv(batch, q_len, kv_len, *heads, dim)
    return (3 * q).to(dtype), (3 * k).to(dtype), v.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("config", "batch", "q_len", "kv_len", "heads", "dim", "prompt_len"),
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
def test_both_ways_of_writing_it_keep_the_same(config, batch, q_len, kv_len, heads, dim, prompt_len, dtype):
    q, k, v = peaked(batch, q_len, kv_len, heads, dim, dtype)
    fast, plain = (
        select_blocks(q, k, v, config=config, prompt_len=prompt_len, backend=backend) for backend in ("torch", "reference")
    )
    assert torch.equal(fast.to_mask(), plain.to_mask())
    assert fast.density() < 1


def test_with_pools_of_one_the_estimate_is_the_largest_true_share_of_a_query():
    q, k, _ = peaked(1, 96, 96, (2, 1), 16)
    (first, masses), *rest = block_masses(q, k, replace(SMALL, query_pool=1, key_pool=1), 0.25)
    assert first == 0
    assert not rest
    one_query_a_block = block_mass(q, k, 0.25, 1, 95).unflatten(2, (6, 16)).sum(3)
    last_query = [block_masses(q[:, 95:], k, replace(SMALL, query_pool=1, key_pool=1), 0.25)]
    torch.testing.assert_close(next(last_query[0])[1][:, :, 0].float(), one_query_a_block)
    assert (masses[0, :, 5] >= one_query_a_block[0] - 1e-6).all()


def test_a_key_that_its_pools_mean_hides_is_noticed():
    q, k, v = (torch.zeros(1, 160, 1, 16) for _ in range(3))
    q[..., 0] = 4.0
    k[0, 40, 0, 0], k[0, 41, 0, 0] = 16.0, -16.0  # exp(16) for one key of block 2, in a pool whose mean is zero
    means, judged = (Mass(replace(SMALL, share=2.0, spread=spread))(q, k, v).to_mask()[0, 0] for spread in (0.0, 0.5))
    assert not means[5:9, 2].any()
    assert judged[5:9, 2].all()
    assert not judged[5:9, 3].any()


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, head_factors=(FACTORS,))], ids=["one-share", "factors"])
def test_a_chunk_keeps_what_the_whole_prompt_keeps(config):
    q, k, v = peaked(1, 330, 330, (4, 2), 16)
    whole = Mass(config)(q, k, v).to_mask()
    for low, high in ((0, 96), (96, 240), (240, 330)):
        chunk = Mass(config)(q[:, low:high], k[:, :high], v[:, :high], prompt_len=330).to_mask()
        assert torch.equal(chunk, whole[:, :, low // 16 : -(-high // 16), : -(-high // 16)])


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, head_factors=(FACTORS,))], ids=["one-share", "factors"])
def test_runs_of_another_size_keep_the_same(config, monkeypatch):
    q, k, v = peaked(1, 200, 330, (4, 2), 16)
    whole = Mass(config)(q, k, v).to_mask()
    monkeypatch.setattr(mass, "_WORKSPACE", 1)  # a row at a time
    assert torch.equal(Mass(config)(q, k, v).to_mask(), whole)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_each_head_keeps_what_its_own_share_keeps(backend):
    q, k, v = peaked(2, 90, 200, (4, 2), 16)
    chosen = select_blocks(q, k, v, config=replace(SMALL, head_factors=(FACTORS,)), backend=backend).to_mask()
    kept = []
    for head, factor in enumerate(FACTORS):
        alone = select_blocks(q, k, v, config=replace(SMALL, share=1.5 * factor), backend=backend).to_mask()
        assert torch.equal(chosen[:, head], alone[:, head])
        kept.append(int(alone[:, head].sum()))
    assert kept[0] > kept[2] > kept[3]  # or these factors show nothing


def test_factors_of_one_change_nothing():
    q, k, v = peaked(1, 200, 200, (4, 2), 16)
    ones = Mass(replace(SMALL, head_factors=((1.0,) * 4,)))
    assert torch.equal(ones(q, k, v).to_mask(), Mass(SMALL)(q, k, v).to_mask())


@pytest.mark.parametrize("dense_below", [0, 1000])
@pytest.mark.parametrize(
    ("factors", "got"), [((FACTORS, FACTORS), "2 x 4"), ((FACTORS[:3],), "1 x 3"), ((FACTORS[:2],), "1 x 2")]
)
def test_factors_of_several_layers_or_of_other_heads_are_refused(factors, got, dense_below):
    policy = Mass(replace(SMALL, head_factors=factors, dense_below=dense_below))
    with pytest.raises(ValueError, match="expected") as refused:
        policy(*peaked(1, 90, 90, (4, 2), 16))
    assert str(refused.value) == (
        f"config: expected head_factors of one layer and the 4 query heads of q, got {got} of them; "
        "pass config.for_layer(layer)"
    )


def test_there_is_room_for_every_causal_block():
    assert row_budgets(SMALL, 5) == (1, 2, 3, 4, 5)


def test_a_head_keeps_the_same_whatever_heads_are_beside_it():
    q, k, v = peaked(1, 200, 200, (6, 3), 16)
    together = Mass(SMALL)(q, k, v).to_mask()
    alone = Mass(SMALL)(q[:, :, 2:4], k[:, :, 1:2], v[:, :, 1:2]).to_mask()
    assert torch.equal(together[:, 2:4], alone)


def test_even_attention_keeps_everything():
    q, k, v = (torch.ones(1, 160, 1, 8) for _ in range(3))
    assert Mass(replace(SMALL, share=1.0))(q, k, v).density() == 1


def test_what_is_dropped_is_estimated_below_the_share():
    q, k, v = peaked(1, 200, 200, (2, 1), 16)
    mask = Mass(SMALL)(q, k, v).to_mask()
    ((_, masses),) = block_masses(q, k, SMALL, 0.25)
    causal = torch.ones(13, 13, dtype=torch.bool).tril()
    assert (masses[causal & ~mask] < 1.5 / 13).all()
    assert not mask[..., causal].all()


def test_keys_that_are_not_numbers_stay_visible():
    q, k, v = peaked(1, 200, 200, (1, 1), 16)
    k[0, 40] = torch.nan
    selection = Mass(SMALL)(q, k, v)
    assert torch.equal(selection.to_mask()[0, 0, 2:, 2], torch.ones(11, dtype=torch.bool))
    out = block_sparse_attention(q, k, v, selection)
    assert out[0, 40:].isnan().all()


@pytest.mark.parametrize(
    "change",
    [{"share": 4.0}, {"spread": 0.2}, {"query_pool": 16}, {"key_pool": 16}, {"sink_blocks": 3}, {"local_blocks": 4},
     {"tail_blocks": 4}, {"block_size": 32}, {"head_factors": ((1.0, 4.0),)}],
    ids=str,
)  # fmt: skip
def test_every_field_changes_the_result(change):
    q, k, v = peaked(1, 330, 330, (2, 1), 16)
    config = replace(SMALL, share=3.0)
    before, after = (stem_attention(q, k, v, config=c) for c in (config, replace(config, **change)))
    assert not torch.equal(before, after)


def test_pools_are_means_of_the_tokens_that_are_there():
    x = torch.arange(1.0, 8.0).view(1, 7, 1, 1)
    means, counts = pool(x, 5, 8, 4)  # positions 5 to 11
    assert means.flatten().tolist() == [0.0, 2.0, 5.5, 0.0]
    assert counts.tolist() == [0, 3, 4, 0]
    assert pool_variances(x, 8, 4).flatten().tolist() == pytest.approx([1.25, 2 / 3])
    assert pool_variances(x, 16, 4).flatten().tolist() == pytest.approx([1.25, 2 / 3, 0.0, 0.0])


def test_no_queries_have_an_empty_selection():
    q, k, v = peaked(1, 8, 40, (2, 1), 16)
    assert Mass(SMALL)(q[:, :0], k, v).counts.shape == (1, 2, 0)


def test_a_policy_takes_the_configs_of_its_rule():
    assert isinstance(policy_of(StemConfig.mass()), Mass)
    assert isinstance(policy_of(StemConfig.paper()), Stem)
    with pytest.raises(ValueError, match='config: expected one with keep="mass"'):
        Mass(StemConfig())
    with pytest.raises(ValueError, match='config: expected one with keep="budget"'):
        Stem(StemConfig.mass())


@pytest.mark.parametrize(
    ("fields", "name"),
    [({"keep": "most"}, "keep"), ({"share": 0.0}, "share"), ({"query_pool": 48}, "block_size"), ({"key_pool": 0}, "key_pool"),
     ({"beta": 0.5}, "beta"), ({"forced": "extra"}, "forced")],
)  # fmt: skip
def test_a_bad_field_is_named(fields, name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        StemConfig.mass(**fields)


def test_settings_of_the_other_rule_are_refused():
    with pytest.raises(ValueError, match="share: .* means nothing under keep='budget'"):
        StemConfig(share=2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_masses_are_summed_in_fp64_on_a_cpu(dtype):
    """So that a chunk of a prompt estimates to the last bit what the whole does, whatever the shapes of its products."""
    q, k = (torch.randn(1, 128, heads, 16, dtype=dtype) for heads in (2, 1))
    assert all(mass.dtype == torch.float64 for _, mass in block_masses(q, k, StemConfig.mass(), 0.25))
