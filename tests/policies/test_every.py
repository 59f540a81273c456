"""What every policy promises whatever its rule: chunks, rows, workspaces, scale, devices, precision, NaN, memory."""

from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch

from stem_attention import policies
from stem_attention.policies import FlashPrefillTopK, Mass, Oracle, XAttention, parse_spec, policy_names
from stem_attention.policies.base import softcap_for
from stem_attention.testing import make_qkv

SIZE = 16
SMALL = {
    "block_size": SIZE, "stride": 4, "query_pool": 4, "key_pool": 8, "sink_blocks": 1, "local_blocks": 1, "min_blocks": 2,
    "share": 1.5, "spread": 0.1, "knee_tokens": 160, "ratio_short": 0.3, "window_blocks": 2, "threshold": 0.8, "tail_blocks": 1,
    "global_blocks": 1, "random_blocks": 2,
}  # fmt: skip


def small(name, **changes):
    """The policy of a name, sparse at a few blocks of 16 tokens."""
    policy = parse_spec(name).policy
    return replace(policy, **{field: SMALL[field] for field in SMALL.keys() & {f.name for f in fields(policy)}}, **changes)


POLICIES = {
    **{name: small(name) for name in policy_names()},
    "factors": small("mass", head_factors=((0.2, 1.0, 1.7, 6.0),)),
    "extra": small("oracle", forced="extra"),
}
EVERY = pytest.mark.parametrize("name", POLICIES)
BY_POSITION = ("dense", "sink-window", "strided", "longformer", "bigbird")


def qkv(q_len, kv_len, dtype=torch.float64):
    """Far enough from even that something is dropped."""
    return [3 * x for x in make_qkv(2, q_len, kv_len, 4, 2, 16, dtype)]


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "angelslim"])  # which looks at the whole prompt
def test_chunks_on_block_borders_keep_what_one_call_keeps(name):
    q, k, v = qkv(163, 163, torch.float32)
    selection = POLICIES[name](q, k, v)
    whole = selection.to_mask()
    assert (selection.density() < 0.95) == (name != "dense")
    for low, high in pairwise((0, 16, 96, 144, 163, 163)):
        chunk = POLICIES[name](q[:, low:high], k[:, :high], v[:, :high], prompt_len=163)
        rows = slice(low // SIZE, chunk.grid.end_row)
        assert torch.equal(chunk.to_mask(), whole[:, :, rows, : chunk.key_blocks])


@EVERY
def test_workspaces_of_any_size_keep_the_same(name, monkeypatch):
    q, k, v = qkv(160, 183)
    whole = POLICIES[name](q, k, v)
    for room, rows in ((1, 1), (5000, 3)):
        for module in (policies.mass, policies.rivals, policies.oracle):
            monkeypatch.setattr(module, "_WORKSPACE", room)
        monkeypatch.setattr(policies.stem, "_ROWS_PER_CHUNK", rows)
        monkeypatch.setattr(policies.ranked, "_RUN", rows)
        assert torch.equal(POLICIES[name](q, k, v).indices, whole.indices)


@EVERY
def test_everything_is_made_on_the_tensors_own_device(name):
    """A default device elsewhere (here one that holds no data) must not reach inside."""
    q, k, v = make_qkv(2, 90, 500, 4, 2, 16)
    policy = POLICIES[name]
    expected, limits = policy(q, k, v), policy.row_limits(40)
    with torch.device("meta"):
        selection, again = policy(q, k, v), replace(policy).row_limits(40)
    assert selection.indices.device == selection.counts.device == q.device
    assert torch.equal(selection.indices, expected.indices)
    assert limits == again


@EVERY
def test_the_scale_is_one_over_the_root_of_the_dimension_unless_given(name):
    q, k, v = make_qkv(1, 400, 400, 4, 2, 16)
    policy = POLICIES[name]
    assert torch.equal(policy(q, k, v).indices, policy(q, k, v, scale=0.25).indices)
    if name not in (*BY_POSITION, "angelslim"):  # which keeps all of this
        # Without values only the order of the scores counts.
        other = -0.25 if name == "uniform" else 4.0
        assert not torch.equal(policy(q, k, v).to_mask(), policy(q, k, v, scale=other).to_mask())


@EVERY
def test_scores_under_a_soft_cap_are_those_of_capped_attention(name):
    """A wide cap changes nothing, and a narrow one what follows from scores."""
    q, k, v = qkv(400, 400)
    v = v * torch.linspace(0, 4, 400, dtype=v.dtype).exp()[:, None, None]
    policy = POLICIES[name]
    plain, wide, narrow = (policy(q, k, v, **softcap_for(type(policy).__call__, cap)).to_mask() for cap in (None, 1e9, 2.0))
    assert torch.equal(plain, wide)
    # A cap is monotonic: where nothing but the order of single scores counts, it changes nothing.
    assert torch.equal(plain, narrow) == (name in (*BY_POSITION, "uniform", "angelslim"))


@EVERY
@pytest.mark.parametrize("tokens", [0, 1, 16, 17, 335, 2000])
def test_rows_are_known_without_data_where_a_policy_says_so(name, tokens):
    policy = POLICIES[name]
    counts, limits = policy.row_counts(-(-tokens // SIZE)), policy.row_limits(-(-tokens // SIZE))
    selection = policy(*make_qkv(1, tokens, tokens, 4, 2, 8))
    assert (selection.counts <= torch.tensor(limits)).all()
    assert (counts is None) == (name in ("mass", "factors", "xattention", "angelslim", "extra"))
    if counts is not None:
        assert counts == limits
        assert selection.counts.tolist() == [[list(counts)] * 4]
        assert policy.density(tokens) == pytest.approx(selection.density())
    else:
        assert policy.density(tokens) is None


@pytest.mark.parametrize("name", ["mass", "stem", "paper", "uniform", "xattention", "flashprefill-topk"])
def test_a_nan_that_would_poison_dense_attention_is_kept(name):
    q, k, v = qkv(160, 160)
    clean = POLICIES[name](q, k, v).to_mask()[0]
    k[0, 70, 0, 0] = torch.nan
    mask = POLICIES[name](q, k, v).to_mask()[0]
    assert mask[:2, 5:, 4].all()
    assert [torch.equal(mask[heads], clean[heads]) for heads in (slice(2), slice(2, 4))] == [False, True]
    if name in ("mass", "xattention"):  # no share of such a row is known
        assert torch.equal(mask[:2, 5:], torch.ones(10, 10, dtype=torch.bool).tril()[5:].expand(2, -1, -1))


@pytest.mark.parametrize("name", ["stem", "angelslim", "uniform", "oracle", "extra", "xattention", "xattention-topk"])
def test_low_precision_inputs_are_scored_in_fp32(name):
    q, k, v = qkv(1000, 1000, dtype=torch.bfloat16)
    assert torch.equal(POLICIES[name](q, k, v).indices, POLICIES[name](q.float(), k.float(), v.float()).indices)


@pytest.mark.parametrize(
    ("module", "room", "q_len", "most", "run"),
    [
        # A row of tiles or a copy of the keys, not (N / stride)^2.
        (policies.mass, 1, 1024, 4 * 4096 * 4, lambda q, k: XAttention(2, 0.9, SIZE).masses(q, k, 1.0)),
        # Three of 256 rows, fewer than a copy of the keys.
        (policies.rivals, 12 * SIZE * 256, 4096, 4 * 4096 * 4, lambda q, k: FlashPrefillTopK(SIZE).scores(q, k, k, 1.0)),
        (
            policies.mass,
            12 * 256,
            4096,
            4 * 4096 * 4,
            lambda q, k: policies.mass.block_masses(q, k, Mass(block_size=SIZE, key_pool=16), 1.0),
        ),
        # Three of four heads.
        (policies.oracle, 3 * SIZE * 4096, SIZE, 3 * SIZE * 4096, lambda q, k: Oracle(SIZE).scores(q, k, k, 1.0)),
    ],
    ids=["xattention", "flashprefill", "mass", "oracle"],
)
def test_the_workspace_bounds_what_is_held_at_a_time(module, room, q_len, most, run, monkeypatch, largest):
    """Stem's, which has no such knob: tests/test_api.py."""
    monkeypatch.setattr(module, "_WORKSPACE", room)
    q, k = (torch.zeros(1, length, 4, 4) for length in (q_len, 4096))
    with largest:
        for _ in run(q, k):
            pass
    assert 0 < largest.seen <= most
