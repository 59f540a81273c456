"""Calls that keep by mass are cut where their lists would be too long, and the cuts lie on block borders."""

from itertools import pairwise

import pytest
import torch

from stem_attention import Mass, Stem
from stem_attention.backends.triton.pieces import LIST_BYTES, pieces, run_borders
from stem_attention.blocks import BlockGrid
from stem_attention.call import Call, PackedBatch


def packed_call(lengths, policy=None):
    batch = PackedBatch.plan([q for q, _ in lengths], [k for _, k in lengths], device=torch.device("cpu"))
    q, k = (torch.empty(starts[-1], heads, 8) for starts, heads in ((batch.q_starts, 32), (batch.k_starts, 8)))
    return Call(q, k, k, Mass() if policy is None else policy, 0.1, batch=batch)


@pytest.mark.parametrize(
    ("q_len", "kv_len", "heads"), [(131072, 131072, 32), (1, 5000, 8), (1 << 20, 1 << 20, 32), (700000, 1 << 20, 32)]
)
def test_runs_cover_the_queries_and_their_lists_fit(q_len, kv_len, heads):
    parts = run_borders(BlockGrid(q_len, kv_len, 64), heads)
    assert [parts[0][0], *(high for _, high in parts)] == [low for low, _ in parts] + [kv_len]
    assert parts[0][0] == kv_len - q_len
    for _, high in parts[:-1]:
        assert high % 64 == 0
    for low, high in parts:
        assert (-(-high // 64) - low // 64) * -(-kv_len // 64) * heads * 4 <= LIST_BYTES


def test_one_run_does_for_what_is_usual():
    assert run_borders(BlockGrid(131072, 131072, 64), 32) == [(0, 131072)]


def test_pieces_of_a_long_call_cover_it():
    q, k = torch.empty(1, 700000, 32, 1), torch.empty(1, 1 << 20, 8, 1)
    parts = pieces(Call(q, k, k, Mass(), 0.1, 1 << 20))
    assert len(parts) > 1
    assert sum(part.q.shape[1] for part, _ in parts) == 700000
    owns = [queries[1] for _, queries in parts]
    assert [own.stop for own in owns[:-1]] == [own.start for own in owns[1:]]
    for part, queries in parts:
        assert part.grid.start == (1 << 20) - 700000 + queries[1].start
        assert queries == (slice(None), queries[1])


@pytest.mark.parametrize(
    "lengths",
    [
        [(300, 300)],
        [(8192, 32768)] * 8,
        [(5, 9), (1 << 18, 1 << 18), (0, 100), (64, 200000)],
        [(1, 1)] * 70,
        [(8192, 1 << 20)],
        [(65536, 1 << 20)],
    ],
)
def test_pieces_cover_a_batch_in_order(lengths):
    call = packed_call(lengths)
    parts = pieces(call)
    if len(parts) == 1:
        assert parts[0][0] is call
        return
    owns = [queries[0] for _, queries in parts]
    assert [own.start for own in owns] == [0] + [own.stop for own in owns[:-1]]
    assert owns[-1].stop == call.batch.q_starts[-1]
    for part, _ in parts:
        batch = part.batch
        assert batch.q_starts[-1] == part.q.shape[0]
        assert batch.k_starts[-1] == part.k.shape[0]
        assert [batch.cu_q.tolist(), batch.cu_k.tolist()] == [list(batch.q_starts), list(batch.k_starts)]
        rows = max(-(-(b - a) // 64) + 1 for a, b in pairwise(batch.q_starts))
        blocks = max(-(-(b - a) // 64) for a, b in pairwise(batch.k_starts))
        assert batch.sequences * (rows - 1) * blocks * 32 * 4 <= LIST_BYTES


def test_a_cut_sequence_ends_every_piece_on_a_block_border_of_its_own():
    parts = [part.batch for part, _ in pieces(packed_call([(100, 100), (1 << 18, 1 << 18)]))][1:]
    assert len(parts) > 1
    for batch in parts:
        assert batch.k_starts[-1] % 64 == 0


def test_a_batch_is_cut_once_for_all_layers():
    call = packed_call([(100, 100), (1 << 18, 1 << 18)])
    assert [part.batch for part, _ in pieces(call)] == [part.batch for part, _ in pieces(call)]


def test_a_budget_needs_no_cuts():
    assert len(pieces(packed_call([(1 << 20, 1 << 20)], Stem()))) == 1
