"""The oracle against attention weights written out in full."""

from dataclasses import replace

import pytest
import torch

from stem_attention import StemConfig
from stem_attention.policies import Oracle, Stem, oracle
from stem_attention.policies.budget import row_budgets
from stem_attention.policies.oracle import block_mass

SIZE = 16
CONFIG = StemConfig(block_size=SIZE, stride=4, sink_blocks=1, local_blocks=2, tail_blocks=1, ratio_short=0.5, knee_tokens=10**6)


def qkv(q_len, kv_len, q_heads=6, kv_heads=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, q_len, q_heads, 8), (2, kv_len, kv_heads, 8), (2, kv_len, kv_heads, 8))
    return [(2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for shape in shapes]


def brute_mass(q, k, scale, row):
    """``(batch, heads, row + 1)`` from the whole matrix of weights."""
    kv_len, start = k.shape[1], k.shape[1] - q.shape[1]
    keys = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    logits = torch.einsum("bihd,bjhd->bhij", q, keys) * scale
    positions = torch.arange(start, kv_len)[:, None]
    weights = logits.masked_fill(torch.arange(kv_len) > positions, -torch.inf).softmax(-1)
    mine = weights[:, :, positions[:, 0] // SIZE == row].mean(2)
    return torch.stack([mine[..., j * SIZE : (j + 1) * SIZE].sum(-1) for j in range(row + 1)], -1)


@pytest.mark.parametrize(("q_len", "kv_len"), [(96, 96), (83, 83), (30, 91), (7, 91), (1, 1)])
@pytest.mark.parametrize("workspace", [1, 4 * 16 * 96, 1 << 24])
def test_block_mass_is_the_softmax_mass_however_many_heads_fit_at_a_time(q_len, kv_len, workspace, monkeypatch):
    monkeypatch.setattr(oracle, "_WORKSPACE", workspace)
    q, k, _ = qkv(q_len, kv_len)
    for row in range((kv_len - q_len) // SIZE, -(-kv_len // SIZE)):
        mass = block_mass(q, k, 0.3, SIZE, row)
        torch.testing.assert_close(mass, brute_mass(q, k, 0.3, row))
        torch.testing.assert_close(mass.sum(-1), torch.ones(2, 6, dtype=torch.float64))


@pytest.mark.parametrize(("q_len", "kv_len"), [(163, 163), (70, 163)])
def test_oracle_keeps_the_heaviest_blocks_beside_the_forced_ones(q_len, kv_len):
    q, k, v = qkv(q_len, kv_len)
    selection = Oracle(CONFIG)(q, k, v, scale=0.3)
    budgets, mask = row_budgets(CONFIG, 11), selection.to_mask()
    for i in range(selection.rows):
        row = selection.first_row + i
        mass = brute_mass(q, k, 0.3, row)[1, 4].tolist()
        forced = {j for j in range(row + 1) if j < 1 or j > row - 2}
        rest = sorted(set(range(row + 1)) - forced, key=lambda j: (-mass[j], j))
        expected = forced | set(rest[: budgets[row] - len(forced)])
        assert mask[1, 4, i].nonzero().flatten().tolist() == sorted(expected)


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, forced="extra"), replace(CONFIG, tail_blocks=0, decay=0.3)])
def test_oracle_spends_stems_budget_and_holds_at_least_its_mass(config):
    q, k, v = qkv(163, 163)
    ours, stems = (policy(config)(q, k, v) for policy in (Oracle, Stem))
    ours.validate()
    if config.forced == "inside":
        assert torch.equal(ours.counts, stems.counts)
        for row in range(11):
            mass = block_mass(q, k, 8**-0.5, SIZE, row)
            held = [(mass * selection.to_mask()[:, :, row, : row + 1]).sum(-1) for selection in (ours, stems)]
            assert bool((held[0] >= held[1] - 1e-12).all())


def test_masses_of_low_precision_inputs_are_accumulated_in_fp32():
    q, k, _ = qkv(96, 96, dtype=torch.bfloat16)
    assert torch.equal(block_mass(q, k, 0.3, SIZE, 5), block_mass(q.float(), k.float(), 0.3, SIZE, 5))


def test_the_workspace_bounds_what_is_held_at_a_time(monkeypatch, largest):
    monkeypatch.setattr(oracle, "_WORKSPACE", 3 * SIZE * 4096)  # three of twelve heads
    q, k = torch.zeros(1, SIZE, 12, 4), torch.zeros(1, 4096, 2, 4)
    with largest:
        block_mass(q, k, 1.0, SIZE, 255)
    assert largest.seen <= 3 * SIZE * 4096
