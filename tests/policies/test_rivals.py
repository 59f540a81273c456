"""The policies that Stem is compared with, each against its definition written as a plain loop."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_attention import Stem
from stem_attention.policies import (
    BigBird,
    Dense,
    FlashPrefillTopK,
    Longformer,
    Oracle,
    SinkWindow,
    Strided,
    XAttention,
    XAttentionTopK,
)
from stem_attention.policies.oracle import block_mass
from stem_attention.policies.rivals import cover
from stem_attention.testing import make_qkv

SIZE = 16
BUDGET = {"block_size": SIZE, "sink_blocks": 1, "local_blocks": 2, "tail_blocks": 1, "ratio_short": 0.5, "knee_tokens": 10**6}
SPANS = pytest.mark.parametrize(("q_len", "kv_len"), [(96, 96), (83, 83), (16, 96), (30, 91), (7, 91), (1, 1)])


def qkv(q_len, kv_len, dtype=torch.float64):
    return [2 * x for x in make_qkv(2, q_len, kv_len, 4, 2, 8, dtype)]


def kept(policy, row, head=0, prompt_len=None):
    mask = policy(*qkv(20 * SIZE, 20 * SIZE), prompt_len=prompt_len).to_mask()
    return mask[0, head, row].nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("policy", "row", "expected"),
    [
        (Dense(SIZE), 12, list(range(13))),
        (SinkWindow(2, 3, SIZE), 10, [0, 1, 8, 9, 10]),
        (SinkWindow(2, 3, SIZE), 3, [0, 1, 2, 3]),
        (SinkWindow(0, 1, SIZE), 7, [7]),
        (Strided(2, 4, SIZE), 10, [2, 6, 9, 10]),  # counted back from the diagonal
        (Strided(3, 5, SIZE), 19, [4, 9, 14, 17, 18, 19]),
        (Longformer(2, 1, 1, SIZE), 10, [0, 9, 10]),
        (Longformer(2, 1, 1, SIZE), 19, list(range(20))),
        (Longformer(2, 1, 0, SIZE), 19, [0, 18, 19]),
        (BigBird(2, 1, 2, 3, SIZE), 19, [0, 1, 7, 18, 19]),  # drawn alike by every process on every machine
    ],
)
def test_patterns_worked_by_hand(policy, row, expected):
    assert kept(policy, row) == expected


def test_the_last_rows_of_longformer_are_those_of_the_whole_prompt():
    assert kept(Longformer(2, 1, 1, SIZE), 19, prompt_len=21 * SIZE) == [0, 18, 19]


def test_bigbird_adds_random_blocks_by_seed_head_and_row_between_global_blocks_and_window():
    mask = BigBird(2, 1, 3, 0, SIZE)(*qkv(320, 320)).to_mask()
    for row in range(20):
        fixed = {j for j in range(row + 1) if j < 1 or j > row - 2}
        ids = set(mask[0, 0, row].nonzero().flatten().tolist())
        assert fixed <= ids <= set(range(row + 1))
        assert len(ids) == min(len(fixed) + 3, row + 1)
    assert torch.equal(mask[0], mask[1])
    assert not torch.equal(mask[0, 0], mask[0, 1])
    assert not torch.equal(mask[0, :, 12, 1:11], mask[0, :, 13, 1:11])
    assert not torch.equal(mask, BigBird(2, 1, 3, 1, SIZE)(*qkv(320, 320)).to_mask())
    assert torch.equal(mask, BigBird(2, 1, 3, 0, SIZE)(*qkv(400, 400)).to_mask()[:, :, :20, :20])


def xattention_mass(q, k, row, stride, scale):
    """Mass of every block of ``row`` for one head, written from the paper: one tile pair at a time."""
    start, per_block = len(k) - len(q), SIZE // stride
    mass = [0.0] * (row + 1)
    for a in range(row * per_block, (row + 1) * per_block):
        rows = [i for i in range(a * stride, (a + 1) * stride) if start <= i < len(k)]
        if not rows:
            continue
        logits = []
        for b in range(a + 1):
            pairs = [(i, b * stride + stride - 1 - i % stride) for i in rows]
            total = sum(float(q[i - start] @ k[j]) for i, j in pairs if j < len(k))
            logits.append(scale * total / len(rows))
        weights = [math.exp(x - max(logits)) for x in logits]
        for b, weight in enumerate(weights):
            mass[b // per_block] += weight / sum(weights)
    return mass


def smallest_cover(mass, threshold):
    """Sink and diagonal, then the heaviest blocks, ties to the smaller id, until the threshold is reached."""
    chosen = {0, len(mass) - 1}
    for j in sorted(range(len(mass)), key=lambda j: (-mass[j], j)):
        if sum(mass[i] for i in chosen) >= threshold * sum(mass) - 1e-12:
            break
        chosen.add(j)
    return sorted(chosen)


@given(st.lists(st.sampled_from([0.0, 0.1, 0.25, 1.0, 3.0]), min_size=1, max_size=12), st.sampled_from([0.2, 0.5, 0.95]))
@settings(max_examples=60)
def test_cover_is_the_smallest_set_with_ties_to_the_smaller_id(mass, threshold):
    got = cover(torch.tensor(mass, dtype=torch.float64), threshold).nonzero().flatten().tolist()
    assert got == smallest_cover(mass, threshold)


@SPANS
@pytest.mark.parametrize("threshold", [0.5, 0.9, 1.0])
def test_xattention_is_the_published_rule(q_len, kv_len, threshold):
    q, k, v = qkv(q_len, kv_len)
    selection = XAttention(4, threshold, SIZE)(q, k, v, scale=0.1)
    for first, scores in XAttentionTopK(block_size=SIZE, stride=4).scores(q, k, v, 0.1):
        for head, i in product(range(4), range(scores.shape[2])):
            row = first + i
            mass = xattention_mass(q[0, :, head], k[0, :, head // 2], row, 4, 0.1)
            ids = selection.to_mask()[0, head, row - selection.first_row].nonzero().flatten().tolist()
            assert ids == smallest_cover(mass, threshold)
            assert scores[0, head, i, : row + 1].tolist() == pytest.approx(mass)


def energies(q, k, row, head):
    """Summed exponentials of every block of a row: FlashPrefill's rule, one query and one block at a time."""
    start, kv_len = k.shape[1] - q.shape[1], k.shape[1]
    sums = [0.0] * (row + 1)
    for i in range(max(start, row * SIZE), min(kv_len, (row + 1) * SIZE)):
        for j in range(row + 1):
            if (j + 1) * SIZE - 1 <= i:
                mean = k[1, j * SIZE : (j + 1) * SIZE, head // 2].mean(0)
                sums[j] += math.exp(0.7 * float(q[1, i - start, head] @ mean))
    return sums


@SPANS
def test_flashprefill_scores_are_the_authors_sums(q_len, kv_len):
    q, k, v = qkv(q_len, kv_len)
    for row, scores in FlashPrefillTopK(SIZE).scores(q, k, v, 0.7):
        for i, head in product(range(scores.shape[2]), range(4)):
            expected = torch.tensor(energies(q, k, row + i, head), dtype=torch.float64)
            torch.testing.assert_close(scores[1, head, i, : row + i + 1].exp(), expected)


def test_flashprefill_means_are_rounded_as_the_keys_are_and_sums_are_not():
    q, k, v = (x.to(torch.bfloat16) for x in qkv(96, 96))
    means = torch.unflatten(k.float(), 1, (-1, SIZE)).mean(2).to(torch.bfloat16).double().repeat_interleave(SIZE, 1)
    inputs = (q, k, v), (q.double(), means, v.double())
    (_, got), (_, expected) = (next(FlashPrefillTopK(SIZE).scores(*given, 0.7)) for given in inputs)
    torch.testing.assert_close(got, expected)


def brute_mass(q, k, scale, row):
    """``(batch, heads, row + 1)`` from the whole matrix of weights."""
    kv_len, start = k.shape[1], k.shape[1] - q.shape[1]
    logits = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) * scale
    positions = torch.arange(start, kv_len)[:, None]
    weights = logits.masked_fill(torch.arange(kv_len) > positions, -torch.inf).softmax(-1)
    mine = weights[:, :, positions[:, 0] // SIZE == row].mean(2)
    return torch.stack([mine[..., j * SIZE : (j + 1) * SIZE].sum(-1) for j in range(row + 1)], -1)


@SPANS
def test_block_mass_is_the_softmax_mass(q_len, kv_len):
    q, k, _ = qkv(q_len, kv_len)
    for row in range((kv_len - q_len) // SIZE, -(-kv_len // SIZE)):
        mass = block_mass(q, k, 0.3, SIZE, row)
        torch.testing.assert_close(mass, brute_mass(q, k, 0.3, row))
        torch.testing.assert_close(mass.sum(-1), torch.ones(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("changes", [{}, {"tail_blocks": 0, "decay": 0.3}])
def test_oracle_spends_stems_budget_and_holds_at_least_its_mass(changes):
    q, k, v = qkv(163, 163)
    ours, stems = (policy(**{**BUDGET, **changes})(q, k, v) for policy in (Oracle, Stem))
    ours.validate()
    assert torch.equal(ours.counts, stems.counts)
    for row in range(11):
        mass = block_mass(q, k, 8**-0.5, SIZE, row)
        held = [(mass * selection.to_mask()[:, :, row, : row + 1]).sum(-1) for selection in (ours, stems)]
        assert bool((held[0] >= held[1] - 1e-12).all())
