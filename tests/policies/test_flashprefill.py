"""FlashPrefill's score against its definition written as a plain loop."""

import math
from dataclasses import replace

import pytest
import torch

from stem_attention import StemConfig
from stem_attention.policies import FlashPrefillTopK, flashprefill
from stem_attention.policies.budget import row_budgets
from stem_attention.testing import make_qkv

SIZE = 16
CONFIG = StemConfig(block_size=SIZE, stride=4, sink_blocks=1, local_blocks=1, tail_blocks=0, ratio_short=0.5, knee_tokens=10**6)
SCALE = 0.7


def qkv(q_len, kv_len, dtype=torch.float64):
    return [2 * x for x in make_qkv(2, q_len, kv_len, 4, 2, 8, dtype)]


def energies(q, k, row, head):
    """Summed exponentials of every block of a row: the authors' rule, one query and one block at a time."""
    start, kv_len = k.shape[1] - q.shape[1], k.shape[1]
    sums = [0.0] * (row + 1)
    for i in range(max(start, row * SIZE), min(kv_len, (row + 1) * SIZE)):
        for j in range(row + 1):
            if (j + 1) * SIZE - 1 <= i:
                mean = k[1, j * SIZE : (j + 1) * SIZE, head // 2].mean(0)
                sums[j] += math.exp(SCALE * float(q[1, i - start, head] @ mean))
    return sums


def best(sums, budget):
    """First and last block, then the highest ones up to the budget."""
    forced = {0, len(sums) - 1}
    rest = sorted((j for j in range(len(sums)) if j not in forced), key=lambda j: (-sums[j], j))
    return sorted(forced | set(rest[: budget - len(forced)]))


@pytest.mark.parametrize(("q_len", "kv_len"), [(96, 96), (83, 83), (30, 91), (7, 91), (1, 1)])
@pytest.mark.parametrize("workspace", [1, 1 << 24])
def test_scores_are_the_authors_sums_however_many_rows_fit_at_a_time(q_len, kv_len, workspace, monkeypatch):
    monkeypatch.setattr(flashprefill, "_WORKSPACE", workspace)
    q, k, v = qkv(q_len, kv_len)
    first, end = (kv_len - q_len) // SIZE, -(-kv_len // SIZE)
    seen = []
    for row, scores in FlashPrefillTopK(CONFIG).scores(q, k, v, SCALE, first, end):
        for i in range(scores.shape[2]):
            for head in range(4):
                expected = torch.tensor(energies(q, k, row + i, head), dtype=torch.float64)
                torch.testing.assert_close(scores[1, head, i, : row + i + 1].exp(), expected)
            seen.append(row + i)
    assert seen == list(range(first, end))


@pytest.mark.parametrize(("q_len", "kv_len"), [(160, 160), (163, 163), (30, 171)])
def test_stems_budget_is_spent_on_the_highest_sums(q_len, kv_len):
    q, k, v = qkv(q_len, kv_len)
    selection = FlashPrefillTopK(CONFIG)(q, k, v, scale=SCALE)
    budgets, mask = row_budgets(CONFIG, -(-kv_len // SIZE)), selection.to_mask()
    for i in range(selection.rows):
        row = selection.first_row + i
        for head in range(4):
            assert mask[1, head, i].nonzero().flatten().tolist() == best(energies(q, k, row, head), budgets[row])


def test_queries_with_large_logits_decide():
    """Fifteen queries prefer block 1 and one, with larger logits, block 2: a mean of softmaxes would choose block 1."""
    q, k = torch.zeros(1, 5 * SIZE, 1, 8), torch.zeros(1, 5 * SIZE, 1, 8)
    k[0, SIZE : 2 * SIZE, 0, 1], k[0, 2 * SIZE : 3 * SIZE, 0, 2] = 1.0, 1.0
    q[0, 4 * SIZE : -1, 0, 1], q[0, -1, 0, 2] = 5.0, 12.0
    config = replace(CONFIG, min_blocks=3, ratio_short=0.01, ratio_long=0.01, decay=1.0)
    mask = FlashPrefillTopK(config)(q, k, k, scale=1.0).to_mask()[0, 0, 4]
    assert mask.nonzero().flatten().tolist() == [0, 2, 4]


def test_a_nan_is_kept():
    q, k, v = qkv(160, 160)
    k[0, 70, 0, 0] = torch.nan
    mask = FlashPrefillTopK(replace(CONFIG, ratio_short=0.3, ratio_long=0.3))(q, k, v).to_mask()
    assert bool(mask[0, :2, 5:, 4].all())
    assert not bool(mask[0, 2:, 5:, 4].all())


def test_means_are_rounded_as_the_keys_are_and_sums_are_not():
    q, k, v = (x.to(torch.bfloat16) for x in qkv(96, 96))
    means = torch.unflatten(k.float(), 1, (-1, SIZE)).mean(2).to(torch.bfloat16).double().repeat_interleave(SIZE, 1)
    (_, got), (_, expected) = (
        next(FlashPrefillTopK(CONFIG).scores(*given, SCALE, 0, 6)) for given in ((q, k, v), (q.double(), means, v.double()))
    )
    torch.testing.assert_close(got, expected)


def test_the_workspace_bounds_what_is_held_at_a_time(monkeypatch, largest):
    q, k, v = (torch.zeros(1, 4096, 2, 4) for _ in range(3))
    monkeypatch.setattr(flashprefill, "_WORKSPACE", 3 * 2 * SIZE * 256)  # three of 256 rows
    with largest:
        for _ in FlashPrefillTopK(CONFIG).scores(q, k, v, SCALE, 0, 256):
            pass
    assert largest.seen <= max(3 * 2 * SIZE * 256, k.numel())
