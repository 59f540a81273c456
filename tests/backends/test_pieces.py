"""Calls that keep by mass are cut where their lists would be too long, and the cuts lie on block borders."""

from itertools import pairwise

import pytest

from stem_attention import StemConfig
from stem_attention.backends import Packing
from stem_attention.backends.pieces import LIST_BYTES, pieces, runs

MASS = StemConfig.mass()


@pytest.mark.parametrize(
    ("q_len", "kv_len", "heads"), [(131072, 131072, 32), (1, 5000, 8), (1 << 20, 1 << 20, 32), (700000, 1 << 20, 32)]
)
def test_runs_cover_the_queries_and_their_lists_fit(q_len, kv_len, heads):
    parts = runs(q_len, kv_len, heads, MASS)
    assert [parts[0][0], *(high for _, high in parts)] == [low for low, _ in parts] + [kv_len]
    assert parts[0][0] == kv_len - q_len
    for _, high in parts[:-1]:
        assert high % 64 == 0
    for low, high in parts:
        assert (-(-high // 64) - low // 64) * -(-kv_len // 64) * heads * 4 <= LIST_BYTES


def test_one_run_does_for_what_is_usual():
    assert runs(131072, 131072, 32, MASS) == [(0, 131072)]
    assert runs(1 << 20, 1 << 20, 32, StemConfig()) == [(0, 1 << 20)]


def starts(lengths):
    at = [0]
    for length in lengths:
        at.append(at[-1] + length)
    return at


@pytest.mark.parametrize(
    "lengths", [[(300, 300)], [(8192, 32768)] * 8, [(5, 9), (1 << 18, 1 << 18), (0, 100), (64, 200000)], [(1, 1)] * 70]
)
def test_pieces_cover_a_batch_in_order(lengths):
    packing = Packing(starts(q for q, _ in lengths), starts(k for _, k in lengths))
    parts = pieces(packing, 32, MASS)
    assert [part.queries for part in parts] == list(pairwise([0] + [part.queries[1] for part in parts]))
    assert parts[-1].queries[1] == packing.q_starts[-1]
    for part in parts:
        first, end = part.sequences
        assert part.packing.q_starts[-1] == part.queries[1] - part.queries[0]
        assert part.packing.k_starts[-1] == part.keys[1] - part.keys[0]
        assert part.keys[0] == packing.k_starts[first]
        assert len(part.packing.q_starts) == end - first + 1
        rows = max(-(-(b - a) // 64) + 1 for a, b in pairwise(part.packing.q_starts))
        blocks = max(-(-(b - a) // 64) for a, b in pairwise(part.packing.k_starts))
        assert (end - first) * (rows - 1) * blocks * 32 * 4 <= LIST_BYTES


def test_a_cut_sequence_ends_every_piece_on_a_block_border_of_its_own():
    packing = Packing([0, 100, 100 + (1 << 18)], [0, 100, 100 + (1 << 18)])
    parts = [part for part in pieces(packing, 32, MASS) if part.sequences == (1, 2)]
    assert len(parts) > 1
    for part in parts:
        assert part.packing.k_starts[-1] % 64 == 0


def test_a_budget_needs_no_cuts():
    packing = Packing([0, 1 << 20], [0, 1 << 20])
    assert len(pieces(packing, 32, StemConfig())) == 1
