"""Stem's selection: every field matters, ties stay ties in chunks, and the reference agrees."""

import dataclasses
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fuzz.strategies import stems

from stem_attention import Stem, select_blocks, stem_attention
from stem_attention.backends.reference.select import block_magnitude, block_scores, select_by_score
from stem_attention.testing import structured_qkv


def qkv(q_len, kv_len, q_heads=2, kv_heads=1, dim=16, seed=0, dtype=torch.float64):
    return structured_qkv(1, q_len, kv_len, q_heads, kv_heads, dim, dtype, seed=seed)


# 40 blocks of 16 tokens; the first row's budget is 8 = 0.4 * the 20 blocks of the knee, between 0.1 * 40 and 0.4 * 40.
BASE = Stem(block_size=16, stride=4, ratio_short=0.4, knee_tokens=320, sink_blocks=1, local_blocks=1, tail_blocks=1)
CHANGES = [
    ("block_size", 32), ("stride", 8), ("beta", 0.6), ("magnitude", "none"), ("magnitude", "zscore"), ("decay", 1.0),
    ("schedule", "step"), ("schedule", "angelslim"), ("ratio_short", 0.6), ("ratio_long", 0.3), ("knee_tokens", 480),
    ("min_blocks", 12), ("sink_blocks", 3), ("local_blocks", 3), ("tail_blocks", 3), ("forced", "extra"),
]  # fmt: skip


def test_the_changes_cover_every_field():
    assert {name for name, _ in CHANGES} == {field.name for field in dataclasses.fields(Stem)}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("field", "value"), CHANGES)
def test_every_field_changes_the_result(field, value, backend):
    q, k, v = qkv(640, 640)
    changed = dataclasses.replace(BASE, **{field: value})
    before, after = (stem_attention(q, k, v, policy=p, dense_below=0, backend=backend) for p in (BASE, changed))
    assert not torch.allclose(before, after, rtol=1e-3)
    before, after = (select_blocks(q, k, v, policy=policy, backend=backend).to_mask() for policy in (BASE, changed))
    assert not torch.equal(before, after)


@pytest.mark.parametrize("blocks", range(20, 70, 3))
def test_text_that_repeats_ties_exactly_and_chunks_break_the_ties_alike(blocks):
    """A product's rounding may depend on its shape; equal scores must not come apart in a chunk of another shape."""
    length = 16 * blocks - blocks % 16
    q, _, _ = qkv(length, length, q_heads=4, kv_heads=2, dim=64, seed=blocks, dtype=torch.float32)
    _, k, v = qkv(16, 16, q_heads=4, kv_heads=2, dim=64, seed=blocks, dtype=torch.float32)
    k, v = (x.repeat(1, blocks, 1, 1)[:, :length] for x in (k, v))
    policy = Stem.paper(block_size=16, stride=4, sink_blocks=1, local_blocks=1, min_blocks=2)
    whole = policy(q, k, v).to_mask()
    first_ones = torch.arange(blocks) < whole.sum(-1, keepdim=True) - 1
    assert torch.equal(whole[:, :, :-1, :-1] & ~torch.eye(blocks - 1, dtype=torch.bool), first_ones[:, :, :-1, :-1])
    for low in range(16, length, 48):
        chunk = policy(q[:, low : low + 48], k[:, : low + 48], v[:, : low + 48], prompt_len=length).to_mask()
        rows = slice(low // 16, low // 16 + chunk.shape[2])
        assert torch.equal(chunk, whole[:, :, rows, : chunk.shape[3]])


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 97, 127, 128, 129, 251, 509, 997, 1000])
@given(st.data())
@settings(max_examples=10)
def test_selection_equals_the_references_exactly_in_fp64(length, data):
    """In other dtypes, and up to ties: tests/fuzz."""
    policy = data.draw(st.sampled_from([16, 64, 128]).flatmap(stems))
    group, kv_heads = data.draw(st.sampled_from([(1, 2), (2, 1), (2, 2), (4, 1), (7, 1), (8, 1)]))
    dim = data.draw(st.sampled_from([16, 64, 80, 96, 128, 256]))
    shape = (data.draw(st.integers(1, length)), length, group * kv_heads, kv_heads, dim)
    q, k, v = qkv(*shape, seed=data.draw(st.integers(0, 99)))
    scale, prompt_len = dim**-0.5, length + data.draw(st.sampled_from([0, 37, 600]))
    selection = policy(q, k, v, scale=scale, prompt_len=prompt_len)
    expected = select_by_score(q, k, v, policy, scale, prompt_len)
    selection.validate()
    assert torch.equal(selection.counts, expected.counts)
    assert torch.equal(selection.to_mask(), expected.to_mask())


@pytest.mark.parametrize("magnitude", ["log", "zscore", "none"])
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (3, 3), (15, 64), (75, 75), (90, 171)])
def test_scores_are_the_references(q_len, kv_len, magnitude):
    q, k, v = qkv(q_len, kv_len)
    policy = dataclasses.replace(BASE, magnitude=magnitude)
    values = policy.beta * block_magnitude(v[0, :, 0], policy)
    for first, scores in policy.scores(q, k, v, 0.3):
        for head, i in product(range(2), range(scores.shape[2])):
            row = first + i
            expected = block_scores(q[0, :, head], k[0, :, 0], row, policy, 0.3) + values[: row + 1]
            torch.testing.assert_close(scores[0, head, i, : row + 1], expected)


def test_values_whose_norms_fp16_cannot_hold_are_ranked():
    q, k, v = (torch.zeros(1, 640, 1, 64, dtype=torch.float16) for _ in range(3))
    v[:] = 3e4
    v[:, 80:96] = 6e4
    assert BASE(q, k, v).to_mask()[0, 0, 6:, 5].all()
