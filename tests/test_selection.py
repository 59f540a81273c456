"""BlockSelection: round trips, density, and a refusal of every corruption."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_attention import BlockSelection
from stem_attention.blocks import BlockGrid

SIZE = 4


@st.composite
def masks(draw):
    """A causal mask with a full diagonal, and the lengths it is for."""
    kv_len = draw(st.integers(1, 30))
    q_len = draw(st.integers(1, kv_len))
    first, end = (kv_len - q_len) // SIZE, -(-kv_len // SIZE)
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 3)), end - first, end)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, columns = torch.arange(first, end)[:, None], torch.arange(end)
    mask = (torch.rand(shape, generator=generator) < draw(st.floats(0, 1))) & (columns <= rows)
    return mask | (columns == rows), {"block_size": SIZE, "q_len": q_len, "kv_len": kv_len}


def to_lists(mask):
    return [[[row.nonzero().flatten().tolist() for row in head] for head in batch] for batch in mask]


@given(masks())
@settings(max_examples=80)
def test_mask_and_lists_round_trip(case):
    mask, lengths = case
    from_mask, grid = BlockSelection.from_mask(mask, **lengths), BlockGrid(lengths["q_len"], lengths["kv_len"], SIZE)
    from_lists = BlockSelection.from_lists(to_lists(mask), **lengths)
    assert torch.equal(from_mask.to_mask(), mask)
    assert torch.equal(from_lists.to_mask(), mask)
    assert torch.equal(from_mask.indices, from_lists.indices)
    assert torch.equal(from_mask.counts, from_lists.counts)
    assert from_mask.counts.equal(mask.sum(-1, dtype=torch.int32))
    assert from_mask.indices.shape[3] == int(mask.sum(-1).max())
    assert from_mask.grid == grid
    assert (from_mask.first_row, from_mask.rows, from_mask.key_blocks) == (grid.first_row, grid.rows, grid.key_blocks)
    rows, columns = mask.shape[2:]
    causal = torch.ones(rows, columns).tril(columns - rows).sum() * mask.shape[0] * mask.shape[1]
    assert from_mask.density() == pytest.approx(float(mask.sum() / causal))


def good():
    """Two heads over 3 of 5 blocks: rows 2, 3, 4."""
    lists = [[[[0, 2], [3, 1, 2], [0, 4]], [[2], [3, 0], [0, 1, 4]]]]
    return BlockSelection.from_lists(lists, block_size=SIZE, q_len=11, kv_len=19)


def test_ids_are_ascending_and_padded_with_minus_one():
    selection = good()
    selection.validate()
    assert selection.indices.tolist() == [[[[0, 2, -1], [1, 2, 3], [0, 4, -1]], [[2, -1, -1], [0, 3, -1], [0, 1, 4]]]]
    assert selection.counts.tolist() == [[[2, 3, 2], [1, 2, 3]]]
    assert selection.indices.dtype == selection.counts.dtype == torch.int32
    assert selection.density() == 13 / 24


def corrupted(row, ids, count=None):
    selection = good()
    indices, counts = selection.indices.clone(), selection.counts.clone()
    indices[0, 1, row] = torch.tensor(ids)
    counts[0, 1, row] = len([i for i in ids if i != -1]) if count is None else count
    return dataclasses.replace(selection, indices=indices, counts=counts)


@pytest.mark.parametrize(
    ("row", "ids", "count", "message"),
    [
        (0, [2, -1, -1], 0, "counts between 1 and width=3"),
        (0, [2, -1, -1], -1, "counts between 1 and width=3"),
        (2, [0, 1, 4], 4, "counts between 1 and width=3"),
        (1, [0, 3, 4], None, "block ids between 0 and the row's diagonal block"),
        (1, [-5, 0, 3], 3, "block ids between 0 and the row's diagonal block"),
        (1, [0, -1, 3], 3, "block ids between 0 and the row's diagonal block"),
        (1, [3, 0, -1], None, "strictly ascending block ids"),
        (1, [0, 0, 3], None, "strictly ascending block ids"),
        (1, [0, 1, 2], None, "every row to hold its diagonal block"),
        (1, [0, 3, -1], 1, "every row to hold its diagonal block"),
        (0, [2, -2, -1], 1, "padding of -1 after each row's count"),
        (2, [0, 4, 1], 2, "padding of -1 after each row's count"),
    ],
)
def test_validate_refuses_every_corruption(row, ids, count, message):
    with pytest.raises(ValueError, match=f"^selection: expected {message}"):
        corrupted(row, ids, count).validate()


FULL = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
CHANGES = [
    ({"block_size": 0}, "block_size", "an integer >= 1", "tokens per block"),
    ({"q_len": 20}, "q_len", "at most kv_len=19", "the last q_len keys"),
    ({"kv_len": None}, "kv_len", "an integer >= 0", "length of k"),
    ({"q_len": 3}, "indices", "1 rows for q_len=3", "every query block"),
    ({"kv_len": 21}, "indices", "4 rows", "every query block"),
    ({"indices": [1]}, "indices", "an int32 tensor", "from_mask / from_lists"),
    ({"indices": torch.zeros(1, 2, 3, 3)}, "indices", "(batch, q_heads, rows, width)", "convert it"),
    ({"indices": torch.zeros(2, 3, 3, dtype=torch.int32)}, "indices", "(batch, q_heads, rows, width)", "convert it"),
    ({"counts": None}, "counts", "an int32 tensor (1, 2, 3)", "from_mask / from_lists"),
    ({"counts": torch.ones(1, 2, 3, dtype=torch.int64)}, "counts", "an int32 tensor (1, 2, 3)", "count the ids"),
    ({"counts": torch.ones(1, 1, 3, dtype=torch.int32)}, "counts", "an int32 tensor (1, 2, 3)", "count the ids"),
]
MASKS = [
    *(
        (bad, "mask", "bool (batch, q_heads, rows, key_blocks)", "one entry per block pair")
        for bad in (None, FULL.int(), FULL[0])
    ),
    (torch.ones(1, 1, 3, 4, dtype=torch.bool).tril(), "mask", "3 key blocks", "one column for every key block"),
    (FULL[:, :, 1:], "indices", "3 rows", "one row for every query block"),
    (torch.ones_like(FULL), "selection", "the row's diagonal block", "from_mask or from_lists"),
]
LISTS = [
    ([[[[0], [1]]], [[[0], [1]], [[0], [1]]]], "lists", "the same heads in every batch entry", "fill the gaps"),
    ([[[[0], [1]], [[0]]]], "lists", "rows in every head", "fill the gaps"),
    ([], "lists", "the same heads", "fill the gaps"),
    ("0", "lists", "four deep", "nest lists"),
    ([[[[0.5], [1]]]], "lists", "integers of 32 bits", "turn them into int"),
    ([[[[0]]]], "indices", "2 rows", "one row for every query block"),
    ([[[[0], [0]]]], "selection", "diagonal", "from_mask or from_lists"),
]


def of_lists(lists, **device):
    return BlockSelection.from_lists(lists, block_size=SIZE, q_len=8, kv_len=8, **device)


@pytest.mark.parametrize(
    ("build", "value", "name", "expected", "way_out"),
    [
        *((lambda changes: dataclasses.replace(good(), **changes), *row) for row in CHANGES),
        *((lambda mask: BlockSelection.from_mask(mask, block_size=SIZE, q_len=12, kv_len=12), *row) for row in MASKS),
        *((of_lists, *row) for row in LISTS),
        (lambda device: of_lists([[[[0], [1]]]], device=device), "toaster", "device", "a torch device", '"cuda:0"'),
    ],
)
def test_what_is_no_selection_is_refused_with_the_way_out(build, value, name, expected, way_out):
    with pytest.raises(ValueError, match=rf"^{name}: expected .+, got .+; .+") as error:
        build(value)
    assert expected in str(error.value)
    assert way_out in str(error.value)


@pytest.mark.parametrize(("q_len", "kv_len"), [(19, 19), (11, 19), (1, 17), (16, 16), (0, 9), (0, 0)])
@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 6, 8, 9, 18, 19, 400, 2**70])
def test_of_a_window_just_the_blocks_are_kept_that_it_touches(window, q_len, kv_len):
    selection = BlockSelection.of_window(window, block_size=SIZE, q_len=q_len, kv_len=kv_len, batch=2, q_heads=3)
    selection.validate()
    touched = [
        {key // SIZE for query in range(row * SIZE, (row + 1) * SIZE) for key in range(max(0, query - window + 1), query + 1)}
        for row in range(selection.first_row, selection.grid.end_row)
    ]
    for head in selection.to_mask().flatten(0, 1):
        assert [set(row.nonzero().flatten().tolist()) for row in head] == touched


def test_everything_is_made_on_the_tensors_own_device():
    """A default device elsewhere must not reach inside."""
    expected = good()
    mask = expected.to_mask()
    with torch.device("meta"):
        lists = BlockSelection.from_lists([[[[0], [0, 1]]]], block_size=SIZE, q_len=8, kv_len=8, device="cpu")
        masked = BlockSelection.from_mask(mask, block_size=SIZE, q_len=11, kv_len=19)
        masked.validate()
        again = masked.to_mask()
    assert lists.indices.tolist() == [[[[0, -1], [0, 1]]]]
    assert torch.equal(again, mask)
    assert torch.equal(masked.indices, expected.indices)


def test_nothing_to_select_is_a_selection_without_rows():
    lists = BlockSelection.from_lists([[[]]], block_size=SIZE, q_len=0, kv_len=9)
    masked = BlockSelection.from_mask(torch.zeros(1, 1, 0, 3, dtype=torch.bool), block_size=SIZE, q_len=0, kv_len=9)
    for selection in (lists, masked):
        assert selection.indices.shape == (1, 1, 0, 0)
        assert selection.to_mask().shape == (1, 1, 0, 3)
        assert selection.density() == 1.0
        selection.validate()


def test_density_counts_beyond_32_bits():
    """Counts of 2^20 rows of 2^20 blocks sum past 2^31; nothing of that size is allocated."""
    counts = torch.arange(1, 1 + 2**17, dtype=torch.int32).expand(1, 2, -1)
    indices = torch.zeros(1, dtype=torch.int32).expand(1, 2, 2**17, 1)
    selection = BlockSelection(indices, counts, 1, 2**17, 2**17)
    assert int(counts.sum(dtype=torch.int64)) > 2**31
    assert selection.density() == 1.0
