"""Stem's selection: every field matters, chunks change nothing, and the oracle agrees."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_attention import StemConfig, select_blocks, stem_attention
from stem_attention.backends.reference import ReferenceBackend
from stem_attention.backends.reference.select import block_magnitude, block_scores
from stem_attention.policies import Stem

PRESETS = {"default": StemConfig, "paper": StemConfig.paper, "angelslim": StemConfig.angelslim}
LENGTHS = (1, 2, 63, 64, 65, 97, 127, 128, 129, 251, 509, 997, 1000)
FEW_FORCED = {"sink_blocks": 1, "local_blocks": 1, "min_blocks": 2}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def qkv(q_len, kv_len, q_heads=2, kv_heads=1, dim=16, seed=0, dtype=torch.float64, batch=1):
    """Structured enough that blocks differ: drifting keys, values whose norms spread over orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    drift = normal(batch, -(-kv_len // 16), kv_heads, dim).repeat_interleave(16, 1)[:, :kv_len]
    q = normal(batch, q_len, q_heads, dim) + normal(batch, 1, q_heads, dim)
    v = normal(batch, kv_len, kv_heads, dim) * normal(batch, kv_len, kv_heads, 1).exp()
    return [x.to(dtype) for x in (q, normal(batch, kv_len, kv_heads, dim) + drift, v)]


# 40 blocks of 16 tokens; the first row's budget is 8 = 0.4 * the 20 blocks of the knee, between 0.1 * 40 and 0.4 * 40.
BASE = StemConfig(
    block_size=16, stride=4, ratio_short=0.4, knee_tokens=320, sink_blocks=1, local_blocks=1, tail_blocks=1, dense_below=0
)
CHANGES = [
    ("block_size", 32),
    ("stride", 8),
    ("beta", 0.6),
    ("magnitude", "none"),
    ("magnitude", "zscore"),
    ("decay", 1.0),
    ("schedule", "step"),
    ("schedule", "angelslim"),
    ("ratio_short", 0.6),
    ("ratio_long", 0.3),
    ("knee_tokens", 480),
    ("min_blocks", 12),
    ("sink_blocks", 3),
    ("local_blocks", 3),
    ("tail_blocks", 3),
    ("forced", "extra"),
    ("dense_below", 641),
]


def test_the_changes_cover_every_field():
    """``dense_layers`` is the integrations' to obey; the other rule's fields are test_mass.py's."""
    fields = {field.name for field in dataclasses.fields(StemConfig) if field.init}
    elsewhere = {"dense_layers", "keep", "share", "spread", "query_pool", "key_pool", "head_factors"}
    assert {name for name, _ in CHANGES} | elsewhere == fields


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("field", "value"), CHANGES)
def test_every_field_changes_the_result(field, value, backend):
    q, k, v = qkv(640, 640)
    changed = dataclasses.replace(BASE, **{field: value})
    out = stem_attention(q, k, v, config=BASE, backend=backend)
    assert not torch.allclose(out, stem_attention(q, k, v, config=changed, backend=backend), rtol=1e-3)
    before, after = (select_blocks(q, k, v, config=config, backend=backend).to_mask() for config in (BASE, changed))
    assert torch.equal(before, after) == (field == "dense_below")


def test_dense_below_counts_the_tokens_of_the_whole_prompt():
    q, k, v = qkv(320, 320)
    config = dataclasses.replace(BASE, dense_below=640)
    dense = stem_attention(q, k, v, config=config)
    assert not torch.allclose(dense, stem_attention(q, k, v, config=config, prompt_len=640))
    torch.testing.assert_close(dense, stem_attention(q, k, v, config=config, prompt_len=639))


def test_scale_matters_to_the_selection_and_defaults_to_the_root_of_the_dimension():
    q, k, v = qkv(640, 640)
    default = Stem(BASE)(q, k, v).to_mask()
    assert torch.equal(default, Stem(BASE)(q, k, v, scale=16**-0.5).to_mask())
    assert not torch.equal(default, Stem(BASE)(q, k, v, scale=0.01).to_mask())


@st.composite
def prompts(draw):
    """A length and block-aligned borders of its chunks."""
    length = draw(st.integers(1, 1000))
    inner = draw(st.sets(st.integers(1, max(1, (length - 1) // 16)), max_size=4))
    return length, [0, *sorted(16 * block for block in inner if 16 * block < length), length]


@pytest.mark.parametrize("preset", PRESETS)
@given(prompts(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.booleans(), st.integers(0, 9))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_block_aligned_chunks_select_what_one_shot_selects(preset, prompt, dtype, small, seed):
    length, borders = prompt
    config = PRESETS[preset](block_size=16, stride=4, magnitude="log", **(FEW_FORCED if small else {}))
    q, k, v = qkv(length, length, q_heads=4, kv_heads=2, dtype=dtype, seed=seed)
    whole = Stem(config)(q, k, v).to_mask()
    for low, high in pairwise(borders):
        chunk = Stem(config)(q[:, low:high], k[:, :high], v[:, :high], prompt_len=length)
        assert torch.equal(chunk.to_mask(), whole[:, :, low // 16 : -(-high // 16), : -(-high // 16)])


@pytest.mark.parametrize("blocks", range(20, 70, 3))
def test_text_that_repeats_ties_exactly_and_chunks_break_the_ties_alike(blocks):
    """A product's rounding may depend on its shape; equal scores must not come apart in a chunk of another shape."""
    length = 16 * blocks - blocks % 16
    q, _, _ = qkv(length, length, q_heads=4, kv_heads=2, dim=64, seed=blocks, dtype=torch.float32)
    _, k, v = qkv(16, 16, q_heads=4, kv_heads=2, dim=64, seed=blocks, dtype=torch.float32)
    k, v = (x.repeat(1, blocks, 1, 1)[:, :length] for x in (k, v))
    policy = Stem(StemConfig.paper(block_size=16, stride=4, **FEW_FORCED))
    whole = policy(q, k, v).to_mask()
    first_ones = torch.arange(blocks) < whole.sum(-1, keepdim=True) - 1
    assert torch.equal(whole[:, :, :-1, :-1] & ~torch.eye(blocks - 1, dtype=torch.bool), first_ones[:, :, :-1, :-1])
    for low in range(16, length, 48):
        chunk = policy(q[:, low : low + 48], k[:, : low + 48], v[:, : low + 48], prompt_len=length).to_mask()
        rows = slice(low // 16, low // 16 + chunk.shape[2])
        assert torch.equal(chunk, whole[:, :, rows, : chunk.shape[3]])


@st.composite
def problems(draw, length):
    """Arguments of ``Backend.select`` but the tensors' dtype, and what the tensors are made from."""
    block_size = draw(st.sampled_from([16, 64, 128]))
    preset = draw(st.sampled_from(sorted(PRESETS)))
    changes = draw(st.sampled_from([{}, FEW_FORCED, {**FEW_FORCED, "forced": "extra"}]))
    group = draw(st.sampled_from([1, 2, 4, 7, 8]))
    kv_heads = draw(st.sampled_from([1, 2])) if group < 4 else 1
    shape = {
        "q_len": draw(st.integers(1, length)),
        "kv_len": length,
        "q_heads": group * kv_heads,
        "kv_heads": kv_heads,
        "dim": draw(st.sampled_from([16, 64, 80, 96, 128, 256])),
        "seed": draw(st.integers(0, 99)),
    }
    prompt_len = length + draw(st.sampled_from([0, 37, 600]))
    return PRESETS[preset](block_size=block_size, **changes), shape, prompt_len


@pytest.mark.parametrize("length", LENGTHS)
@given(st.data())
@settings(max_examples=10, deadline=None, derandomize=True)
def test_selection_equals_the_oracle_exactly_in_fp64(length, data):
    config, shape, prompt_len = data.draw(problems(length))
    q, k, v = qkv(**shape)
    scale = shape["dim"] ** -0.5
    selection = Stem(config)(q, k, v, scale=scale, prompt_len=prompt_len)
    expected = ReferenceBackend().select(q, k, v, config, scale, prompt_len)
    selection.validate()
    assert torch.equal(selection.counts, expected.counts)
    assert torch.equal(selection.to_mask(), expected.to_mask())


@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 4, 7, 8])
def test_selection_equals_the_oracle_for_every_group_and_head_dimension(group, dim):
    config = StemConfig(block_size=64, **FEW_FORCED)
    q, k, v = qkv(211, 601, q_heads=group, dim=dim)
    expected = ReferenceBackend().select(q, k, v, config, 0.1, 700)
    assert torch.equal(Stem(config)(q, k, v, scale=0.1, prompt_len=700).to_mask(), expected.to_mask())


def doubtful_blocks(q, k, v, config, scale, prompt_len):
    """Distance to the row's cut, relative to its scores, of each block in which low precision and fp64 disagree."""
    wide = [x.double() for x in (q, k, v)]
    exact = ReferenceBackend().select(*wide, config, scale, prompt_len)
    mask, low = exact.to_mask(), Stem(config)(q, k, v, scale=scale, prompt_len=prompt_len).to_mask()
    distances = []
    for b, h, i in (mask != low).any(-1).nonzero().tolist():
        row, kv_head = exact.first_row + i, h // (q.shape[2] // k.shape[2])
        scores = block_scores(wide[0][b, :, h], wide[1][b, :, kv_head], row, config, scale)
        scores += config.beta * block_magnitude(wide[2][b, :, kv_head], config)[: row + 1]
        by_score = [j for j in range(row + 1) if mask[b, h, i, j] and config.sink_blocks <= j <= row - config.local_blocks]
        cut = scores[by_score].min()
        disputed = (mask[b, h, i] != low[b, h, i])[: row + 1]
        distances += ((scores[disputed] - cut).abs() / scores.abs().max()).tolist()
    return distances, mask.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [65, 509, 1000])
@given(st.data())
@settings(max_examples=6, deadline=None, derandomize=True)
def test_low_precision_inputs_differ_only_where_two_scores_lie_within_rounding(dtype, length, data):
    config, shape, prompt_len = data.draw(problems(length))
    q, k, v = qkv(**shape, dtype=dtype)
    distances, blocks = doubtful_blocks(q, k, v, dataclasses.replace(config, forced="inside"), 0.1, prompt_len)
    assert len(distances) <= 1e-3 * blocks
    assert max(distances, default=0) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_near_ties_alone_are_decided_by_rounding(dtype):
    """Keys that repeat but for a last-bit change give scores that fp32 cannot tell apart; nothing else may differ."""
    q, k, v = qkv(1024, 1024, q_heads=4, dim=64, dtype=dtype)
    k = k[:, :32].repeat(1, 32, 1, 1)
    k[:, ::32] *= 1 + torch.arange(32, dtype=torch.float64)[:, None, None].mul(2e-7).to(dtype)
    v = v[:, :32].repeat(1, 32, 1, 1)
    distances, _ = doubtful_blocks(q, k, v, StemConfig(block_size=32, **FEW_FORCED), 0.125, 1024)
    assert max(distances, default=0) < 1e-5


def test_nothing_depends_on_outer_strides_or_on_other_sequences_of_the_batch():
    q, k, v = qkv(300, 640, q_heads=4, kv_heads=2, batch=3)
    whole = Stem(BASE)(q, k, v).to_mask()
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(whole, Stem(BASE)(*strided).to_mask())
    assert torch.equal(whole[1:2], Stem(BASE)(q[1:2], k[1:2], v[1:2]).to_mask())


def test_selection_never_looks_past_the_query_block():
    q, k, v = qkv(640, 640)
    whole = Stem(BASE)(q, k, v).to_mask()
    for x in (k, v):
        x[:, 336:] = x[:, 336:].flip(1) * 100
    assert torch.equal(whole[:, :, :21], Stem(BASE)(q, k, v).to_mask()[:, :, :21])


def test_poisoned_blocks_stay_selected():
    """What dense attention would turn to NaN must not vanish because a block was left out."""
    q, k, v = qkv(640, 640)
    k[0, 100, 0, 3] = float("nan")
    assert bool(Stem(BASE)(q, k, v).to_mask()[..., 7:, 6].all())


def test_chunked_scoring_gives_what_scoring_at_once_gives(monkeypatch):
    q, k, v = qkv(633, 640, q_heads=4, kv_heads=2)
    for config in (BASE, dataclasses.replace(BASE, forced="extra")):
        whole = Stem(config)(q, k, v).to_mask()
        for rows in (1, 3):
            monkeypatch.setattr("stem_attention.policies.stem._ROWS_PER_CHUNK", rows)
            assert torch.equal(whole, Stem(config)(q, k, v).to_mask())
        monkeypatch.undo()
