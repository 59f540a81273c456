"""From scores to kept blocks: forced blocks, then the best, NaN first, ties to the smaller id."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_attention.policies.choose import choose, merge_forced

NAN, INF = math.nan, math.inf


def best(scores, row, budget, sink, local):
    """One row in plain Python."""
    forced = {j for j in range(row + 1) if j < sink or j > row - local}
    ranked = sorted(
        (j for j in range(row + 1) if j not in forced),
        key=lambda j: (not math.isnan(scores[j]), 0.0 if math.isnan(scores[j]) else -scores[j], j),
    )
    return sorted(forced | set(ranked[: budget - len(forced)]))


def pick(scores, budget, sink=0, local=1):
    """The ids of the last row of a prompt of ``len(scores)`` blocks."""
    ids = choose(torch.tensor(scores)[None, None, None], len(scores) - 1, [budget], sink, local)
    return ids[0, 0, 0].tolist()


def test_best_blocks_are_kept_in_ascending_order():
    assert pick([0.1, 0.9, 0.3, 0.8, 0.0], 3) == [1, 3, 4]


def test_ties_go_to_the_smaller_id():
    assert pick([0.5, 0.5, 0.5, 0.5, 0.5], 3) == [0, 1, 4]
    assert pick([0.0, 0.7, 0.2, 0.7, 0.7, 0.0], 3) == [1, 3, 5]
    assert pick([1.0] * 300, 4) == [0, 1, 2, 299]
    assert pick([0.0, -0.0, 0.0, 1.0], 2) == [0, 3]


def test_nan_ranks_above_everything():
    assert pick([INF, 3.0, NAN, 9.0, 0.0], 2) == [2, 4]
    assert pick([INF, NAN, 1.0, NAN, 0.0], 3) == [1, 3, 4]
    assert pick([NAN, NAN, NAN, NAN, NAN], 3) == [0, 1, 4]


def test_minus_infinity_is_a_score_like_any_other():
    assert pick([-INF, -INF, -INF, -INF, -INF], 3) == [0, 1, 4]
    assert pick([-INF, -INF, 0.0, -INF, -INF, -INF], 4, sink=1, local=2) == [0, 2, 4, 5]
    assert pick([-INF, -INF, -INF, -INF, -INF, -INF], 5, sink=1, local=2) == [0, 1, 2, 4, 5]


def test_forced_blocks_are_in_whatever_their_score():
    assert pick([-INF, -9.0, 5.0, 6.0, 7.0, -INF, -9.0], 5, sink=2, local=2) == [0, 1, 4, 5, 6]
    assert pick([NAN, 1.0, NAN], 2, sink=1, local=1) == [0, 2]


def test_blocks_after_the_diagonal_are_never_kept():
    scores = torch.full((1, 1, 3, 6), 1.0)
    scores[..., 3:] = INF
    scores[..., 5] = NAN
    assert choose(scores, 2, [2, 2, 5], 1, 1)[0, 0].tolist() == [[0, 2, -1, -1, -1], [0, 3, -1, -1, -1], [0, 1, 2, 3, 4]]


def test_no_rows_give_no_ids():
    assert choose(torch.zeros(2, 3, 0, 5), 4, [], 1, 1).shape == (2, 3, 0, 0)


SCORES = st.sampled_from([NAN, -INF, INF, -1.0, -0.0, 0.0, 0.5, 1.0, 2.0])


@given(st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_choose_equals_a_plain_sort(data):
    columns = data.draw(st.integers(1, 14), "columns")
    first = data.draw(st.integers(0, columns - 1), "first row")
    sink, local = data.draw(st.integers(0, 4), "sink"), data.draw(st.integers(1, 4), "local")
    rows = range(first, columns)
    budgets = [data.draw(st.integers(min(row + 1, sink + local), row + 1)) for row in rows]
    size = 2 * len(rows) * columns
    flat = data.draw(st.lists(SCORES, min_size=size, max_size=size), "scores")
    scores = torch.tensor(flat).view(1, 2, len(rows), columns)
    ids = choose(scores, first, budgets, sink, local)
    for head in range(2):
        for i, row in enumerate(rows):
            expected = best(scores[0, head, i].tolist(), row, budgets[i], sink, local)
            assert ids[0, head, i].tolist() == expected + [-1] * (max(budgets) - len(expected))


@given(st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_merging_forced_blocks_is_a_union(data):
    columns = data.draw(st.integers(1, 12))
    first = data.draw(st.integers(0, columns - 1))
    sink, local = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 4))
    kept = [sorted(data.draw(st.sets(st.integers(0, row)))) for row in range(first, columns)]
    width = max(map(len, kept))
    ids = torch.tensor([row + [-1] * (width - len(row)) for row in kept], dtype=torch.int64).view(1, 1, len(kept), width)
    merged = merge_forced(ids, first, columns, sink, local)[0, 0].tolist()
    for i, row in enumerate(range(first, columns)):
        union = sorted({*kept[i], *(j for j in range(row + 1) if j < sink or j > row - local)})
        assert merged[i] == union + [-1] * (len(merged[i]) - len(union))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ids_do_not_depend_on_the_dtype_of_the_scores(dtype):
    scores = torch.tensor([[[[0.25, 0.5, 0.5, -1.0, 0.0]]]], dtype=dtype)
    assert choose(scores, 4, [3], 0, 1).tolist() == [[[[1, 2, 4]]]]
