"""The policies that Stem is compared with, each against its definition written as a plain loop."""

import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_attention import StemConfig, block_sparse_attention
from stem_attention.policies import (
    BigBird,
    Dense,
    FlashPrefillTopK,
    Longformer,
    Oracle,
    SinkWindow,
    Stem,
    Strided,
    UniformTopK,
    XAttention,
    XAttentionTopK,
)
from stem_attention.policies.budget import first_row_budget, row_budgets
from stem_attention.policies.xattention import cover

SIZE = 16
SMALL = StemConfig(block_size=SIZE, stride=4, sink_blocks=1, local_blocks=1, tail_blocks=1, ratio_short=0.3, knee_tokens=160)
PATTERNS = {
    "dense": Dense(SIZE),
    "sink-window": SinkWindow(2, 3, SIZE),
    "strided": Strided(2, 4, SIZE),
    "longformer": Longformer(3, 1, 2, SIZE),
    "bigbird": BigBird(2, 1, 2, 5, SIZE),
    "xattention": XAttention(4, 0.8, SIZE),
    "xattention-topk": XAttentionTopK(SMALL),
    "flashprefill-topk": FlashPrefillTopK(SMALL),
    "oracle": Oracle(SMALL),
    "uniform": UniformTopK(StemConfig(block_size=SIZE, sink_blocks=1, local_blocks=1, ratio_short=0.3, knee_tokens=160)),
}


def qkv(q_len, kv_len, q_heads=4, kv_heads=2, dim=8, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, q_len, q_heads, dim), (2, kv_len, kv_heads, dim), (2, kv_len, kv_heads, dim))
    return [(2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for shape in shapes]


def kept(policy, row, head=0, kv_len=20 * SIZE, prompt_len=None):
    q, k, v = qkv(kv_len, kv_len)
    return policy(q, k, v, prompt_len=prompt_len).to_mask()[0, head, row].nonzero().flatten().tolist()


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(
    ("q_len", "kv_len"), [(1, 1), (15, 15), (16, 16), (17, 17), (163, 163), (1, 163), (40, 163), (35, 160), (0, 50)]
)
def test_every_policy_gives_a_valid_causal_selection_with_its_diagonal(name, q_len, kv_len):
    q, k, v = qkv(q_len, kv_len)
    selection = PATTERNS[name](q, k, v)
    selection.validate()
    assert selection.indices.shape[:2] == (2, 4)
    assert (selection.q_len, selection.kv_len) == (q_len, kv_len)
    assert 0 < selection.density() <= 1


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("first_chunk", [16, 96, 144])
def test_block_aligned_chunks_select_what_one_call_selects(name, first_chunk):
    q, k, v = qkv(163, 163)
    whole = PATTERNS[name](q, k, v).to_mask()
    early = PATTERNS[name](q[:, :first_chunk], k[:, :first_chunk], v[:, :first_chunk], prompt_len=163).to_mask()
    late = PATTERNS[name](q[:, first_chunk:], k, v, prompt_len=163).to_mask()
    border = first_chunk // SIZE
    assert torch.equal(early, whole[:, :, :border, :border])
    assert torch.equal(late, whole[:, :, border:])


@pytest.mark.parametrize("name", PATTERNS)
def test_every_policy_runs_on_the_same_kernel(name):
    q, k, v = qkv(70, 163)
    selection = PATTERNS[name](q, k, v)
    out = block_sparse_attention(q, k, v, selection)
    torch.testing.assert_close(out, block_sparse_attention(q, k, v, selection, backend="reference"))


def test_dense_keeps_all_causal_blocks():
    q, k, v = qkv(40, 163)
    assert Dense(SIZE)(q, k, v).density() == 1.0
    assert torch.equal(Dense(SIZE)(q, k, v).to_mask()[1, 3], torch.ones(4, 11, dtype=torch.bool).tril(7))


def test_sink_window_keeps_the_first_and_the_latest_blocks():
    assert kept(SinkWindow(2, 3, SIZE), 10) == [0, 1, 8, 9, 10]
    assert kept(SinkWindow(2, 3, SIZE), 3) == [0, 1, 2, 3]
    assert kept(SinkWindow(0, 1, SIZE), 7) == [7]


def test_strided_counts_back_from_the_diagonal():
    assert kept(Strided(2, 4, SIZE), 10) == [2, 6, 9, 10]
    assert kept(Strided(3, 5, SIZE), 19) == [4, 9, 14, 17, 18, 19]


def test_strided_reaches_every_earlier_block_in_two_steps_when_the_window_spans_the_stride():
    q, k, v = qkv(320, 320)
    hop = Strided(4, 4, SIZE)(q, k, v).to_mask()[0, 0].double()
    assert torch.equal((hop @ hop) > 0, torch.ones(20, 20, dtype=torch.bool).tril())


def test_longformer_keeps_window_global_columns_and_global_rows_of_the_whole_prompt():
    assert kept(Longformer(2, 1, 1, SIZE), 10) == [0, 9, 10]
    assert kept(Longformer(2, 1, 1, SIZE), 19) == list(range(20))
    assert kept(Longformer(2, 1, 1, SIZE), 19, prompt_len=21 * SIZE) == [0, 18, 19]
    assert kept(Longformer(2, 1, 0, SIZE), 19) == kept(SinkWindow(1, 2, SIZE), 19)


def test_bigbird_adds_its_random_blocks_between_global_blocks_and_window():
    for row in range(20):
        ids = kept(BigBird(2, 1, 3, 0, SIZE), row)
        fixed = {j for j in range(row + 1) if j < 1 or j > row - 2}
        assert fixed <= set(ids) <= set(range(row + 1))
        assert len(ids) == min(len(fixed) + 3, row + 1)


def test_bigbird_draws_by_seed_head_and_row():
    q, k, v = qkv(320, 320)
    mask = BigBird(2, 1, 2, 0, SIZE)(q, k, v).to_mask()
    assert torch.equal(mask[0], mask[1])
    assert not torch.equal(mask[0, 0], mask[0, 1])
    assert not torch.equal(mask[0, :, 12, 1:11], mask[0, :, 13, 1:11])
    assert not torch.equal(mask, BigBird(2, 1, 2, 1, SIZE)(q, k, v).to_mask())
    longer = qkv(400, 400)
    assert torch.equal(mask, BigBird(2, 1, 2, 0, SIZE)(*longer).to_mask()[:, :, :20, :20])


def test_bigbird_draws_the_same_in_another_process():
    code = (
        "import torch; from stem_attention.policies import BigBird; x = torch.zeros(1, 320, 2, 4);"
        "print(BigBird(2, 1, 2, 3, 16)(x, x, x).indices.tolist())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    x = torch.zeros(1, 320, 2, 4)
    assert run.stdout.strip() == str(BigBird(2, 1, 2, 3, 16)(x, x, x).indices.tolist())


def test_uniform_is_stem_without_decay_value_term_and_tail():
    q, k, v = qkv(320, 320)
    config = StemConfig(block_size=SIZE, sink_blocks=1, local_blocks=1, ratio_short=0.4, knee_tokens=10**6)
    bare = StemConfig(
        block_size=SIZE, sink_blocks=1, local_blocks=1, ratio_short=0.4, knee_tokens=10**6, decay=1.0, beta=0.0, tail_blocks=0
    )
    selection = UniformTopK(config)(q, k, v)
    assert torch.equal(selection.to_mask(), Stem(bare)(q, k, v).to_mask())
    assert selection.counts[0, 0].tolist() == [min(i + 1, 8) for i in range(20)]
    assert torch.equal(selection.to_mask(), UniformTopK(config)(q, k, 100 * v).to_mask())


@pytest.mark.parametrize("config", [StemConfig(tail_blocks=0), StemConfig.paper()])
@pytest.mark.parametrize("num_blocks", [128, 250, 1024])
def test_uniform_with_scaling_asks_for_the_compute_of_stem(config, num_blocks):
    scaled = UniformTopK(config, scaling=(1 + config.decay) / 2).as_stem().config
    mean = sum(row_budgets(scaled, num_blocks)) / sum(row_budgets(config, num_blocks))
    assert first_row_budget(scaled, num_blocks) == pytest.approx(0.85 * first_row_budget(config, num_blocks), abs=1)
    assert mean == pytest.approx(1, abs=0.08)


def xattention_mass(q, k, row, stride, size, scale):
    """Mass of every block of ``row`` for one head, written from the paper: one tile pair at a time."""
    start, per_block = len(k) - len(q), size // stride
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
        top = max(logits)
        weights = [math.exp(x - top) for x in logits]
        for b, weight in enumerate(weights):
            mass[b // per_block] += weight / sum(weights)
    return mass


def smallest_cover(mass, threshold):
    """Sink and diagonal, then the heaviest blocks, until the threshold is reached."""
    chosen = {0, len(mass) - 1}
    for j in sorted(range(len(mass)), key=lambda j: (-mass[j], j)):
        if sum(mass[i] for i in chosen) >= threshold * sum(mass):
            break
        chosen.add(j)
    return sorted(chosen)


@pytest.mark.parametrize(("q_len", "kv_len"), [(96, 96), (83, 83), (16, 96), (30, 91), (7, 91)])
@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_xattention_is_the_published_rule(q_len, kv_len, threshold):
    q, k, v = qkv(q_len, kv_len)
    selection = XAttention(4, threshold, SIZE)(q, k, v, scale=0.1)
    mask = selection.to_mask()
    for head in range(4):
        for i in range(selection.rows):
            row = selection.first_row + i
            mass = xattention_mass(q[0, :, head], k[0, :, head // 2], row, 4, SIZE, 0.1)
            assert mask[0, head, i].nonzero().flatten().tolist() == smallest_cover(mass, threshold)


def test_xattention_heads_keep_different_numbers_and_a_higher_threshold_keeps_more():
    q, k, v = qkv(320, 320)
    counts = [XAttention(4, threshold, SIZE)(q, k, v).counts for threshold in (0.3, 0.7, 0.99, 1.0)]
    assert any(len(set(counts[1][0, :, row].tolist())) > 1 for row in range(20))
    assert all(bool((low <= high).all()) for low, high in pairwise(counts))
    assert counts[3][0, 0].tolist() == list(range(1, 21))


def best(mass, budget):
    """First and last block, then the heaviest ones up to the budget."""
    forced = {0, len(mass) - 1}
    rest = sorted((j for j in range(len(mass)) if j not in forced), key=lambda j: (-mass[j], j))
    return sorted(forced | set(rest[: budget - len(forced)]))


@pytest.mark.parametrize(("q_len", "kv_len"), [(96, 96), (83, 83), (30, 91)])
def test_xattention_topk_spends_stems_budget_on_the_heaviest_blocks(q_len, kv_len):
    q, k, v = qkv(q_len, kv_len)
    config = replace(SMALL, ratio_short=0.5, tail_blocks=0)
    mask = XAttentionTopK(config)(q, k, v, scale=0.1).to_mask()
    budgets = row_budgets(config, -(-kv_len // SIZE))
    first = (kv_len - q_len) // SIZE
    for head in range(4):
        for i in range(mask.shape[2]):
            mass = xattention_mass(q[0, :, head], k[0, :, head // 2], first + i, 4, SIZE, 0.1)
            assert mask[0, head, i].nonzero().flatten().tolist() == best(mass, budgets[first + i])


def test_xattention_scores_low_precision_inputs_in_fp32():
    q, k, v = qkv(200, 200, dtype=torch.bfloat16)
    policy = XAttention(4, 0.8, SIZE)
    assert torch.equal(policy(q, k, v).to_mask(), policy(q.float(), k.float(), v.float()).to_mask())


def test_xattention_never_holds_a_strided_square_tensor(largest):
    """The largest tensor made is one row of tiles or a copy of the keys, not (N / stride)^2."""

    q, k, v = (torch.zeros(1, 2048, 1, 4) for _ in range(3))
    with largest:
        XAttention(2, 0.9, SIZE)(q, k, v)
    assert largest.seen <= max(2048 * 4, (2048 // SIZE) ** 2) < (2048 // 2) ** 2


def test_xattention_keeps_everything_that_a_nan_would_poison():
    q, k, v = qkv(160, 160)
    k[0, 70, 0, 0] = float("nan")
    mask = XAttention(4, 0.5, SIZE)(q, k, v).to_mask()
    assert torch.equal(mask[0, :2, 5:], torch.ones(10, 10, dtype=torch.bool).tril()[5:].expand(2, -1, -1))
    assert mask[0, 2:, 5:].sum() < mask[0, :2, 5:].sum()


@given(st.lists(st.sampled_from([0.0, 0.1, 0.25, 1.0, 3.0]), min_size=1, max_size=12), st.sampled_from([0.2, 0.5, 0.95]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_cover_is_the_smallest_set_with_ties_to_the_smaller_id(mass, threshold):
    got = cover(torch.tensor(mass, dtype=torch.float64), threshold).nonzero().flatten().tolist()
    needed = threshold * sum(mass)
    forced = {0, len(mass) - 1}
    rest = sorted((j for j in range(len(mass)) if j not in forced), key=lambda j: (-mass[j], j))
    sets = [sorted(forced | set(rest[:n])) for n in range(len(rest) + 1)]
    reached = [ids for ids in sets if sum(mass[j] for j in ids) >= needed - 1e-12]
    assert got == (reached[0] if sum(mass) else sorted(forced))
