"""Rows and columns of a call: worked by hand, and against sets of positions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stem_attention.blocks import BlockGrid


@pytest.mark.parametrize(
    ("q_len", "kv_len", "start", "rows", "key_blocks", "pairs"),
    [
        (12, 12, 0, range(0, 3), 3, 1 + 2 + 3),
        (11, 19, 8, range(2, 5), 5, 3 + 4 + 5),
        (5, 12, 7, range(1, 3), 3, 2 + 3),  # starts inside block 1
        (1, 13, 12, range(3, 4), 4, 4),
        (1, 12, 11, range(2, 3), 3, 3),
        (0, 12, 12, range(3, 3), 3, 0),
        (0, 13, 13, range(3, 3), 4, 0),
        (0, 0, 0, range(0, 0), 0, 0),
    ],
)
def test_blocks_of_four_worked_by_hand(q_len, kv_len, start, rows, key_blocks, pairs):
    grid = BlockGrid(q_len, kv_len, 4)
    assert (grid.start, range(grid.first_row, grid.end_row), grid.key_blocks) == (start, rows, key_blocks)
    assert (grid.rows, grid.causal_pairs) == (len(rows), pairs)
    assert BlockGrid.of(torch.empty(2, q_len, 6, 8), torch.empty(2, kv_len, 3, 8), 4) == grid


@given(st.integers(0, 90), st.integers(0, 90), st.integers(1, 20))
def test_rows_are_the_blocks_of_the_query_positions(cached, q_len, size):
    grid, positions = BlockGrid(q_len, cached + q_len, size), range(cached, cached + q_len)
    rows = range(grid.first_row, grid.end_row)
    assert list(rows) == sorted({position // size for position in positions})
    assert [i for row in rows for i in range(*grid.row_positions(row))] == list(positions)
    for row in rows:
        assert {position // size for position in positions[grid.query_slice(row, row + 1)]} == {row}
    assert positions[grid.query_slice(grid.first_row, grid.end_row)] == positions
    assert grid.key_blocks == len({position // size for position in range(grid.kv_len)})
    assert grid.causal_pairs == sum(row + 1 for row in rows)
