"""BlockSelection: round trips, density, and a refusal of every corruption."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_attention import BlockSelection

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
@settings(max_examples=80, deadline=None, derandomize=True)
def test_mask_and_lists_round_trip(case):
    mask, lengths = case
    from_mask = BlockSelection.from_mask(mask, **lengths)
    from_lists = BlockSelection.from_lists(to_lists(mask), **lengths)
    assert torch.equal(from_mask.to_mask(), mask)
    assert torch.equal(from_lists.to_mask(), mask)
    assert torch.equal(from_mask.indices, from_lists.indices)
    assert torch.equal(from_mask.counts, from_lists.counts)
    assert from_mask.counts.equal(mask.sum(-1, dtype=torch.int32))
    assert from_mask.indices.shape[3] == int(mask.sum(-1).max())


@given(masks())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_density_is_kept_over_causal_block_pairs(case):
    mask, lengths = case
    rows, columns = mask.shape[2:]
    causal = torch.ones(rows, columns).tril(columns - rows).sum() * mask.shape[0] * mask.shape[1]
    assert BlockSelection.from_mask(mask, **lengths).density() == pytest.approx(float(mask.sum() / causal))


def test_ids_are_ascending_and_padded_with_minus_one():
    selection = BlockSelection.from_lists([[[[0], [1, 0], [2, 0]]]], block_size=SIZE, q_len=12, kv_len=12)
    assert selection.indices.tolist() == [[[[0, -1], [0, 1], [0, 2]]]]
    assert selection.counts.tolist() == [[[1, 2, 2]]]
    assert selection.indices.dtype == selection.counts.dtype == torch.int32
    assert selection.density() == 5 / 6


@pytest.mark.parametrize(
    ("q_len", "kv_len", "first_row", "rows", "key_blocks"),
    [
        (12, 12, 0, 3, 3),
        (1, 12, 2, 1, 3),
        (1, 13, 3, 1, 4),
        (5, 12, 1, 2, 3),
        (4, 12, 2, 1, 3),
        (0, 12, 3, 0, 3),
        (0, 0, 0, 0, 0),
    ],
)
def test_rows_are_the_query_blocks_that_the_queries_touch(q_len, kv_len, first_row, rows, key_blocks):
    mask = torch.ones(1, 1, rows, key_blocks, dtype=torch.bool).tril(first_row)
    selection = BlockSelection.from_mask(mask, block_size=SIZE, q_len=q_len, kv_len=kv_len)
    assert (selection.first_row, selection.rows, selection.key_blocks) == (first_row, rows, key_blocks)
    assert selection.density() == 1.0
    assert torch.equal(selection.to_mask(), mask)


def good():
    """Two heads over 3 of 5 blocks: rows 2, 3, 4."""
    lists = [[[[0, 2], [1, 2, 3], [0, 4]], [[2], [0, 3], [0, 1, 4]]]]
    return BlockSelection.from_lists(lists, block_size=SIZE, q_len=11, kv_len=19)


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
        (2, [4, 5, -1], None, "block ids between 0 and the row's diagonal block"),
        (1, [0, -1, 3], 3, "block ids between 0 and the row's diagonal block"),
        (1, [3, 0, -1], None, "strictly ascending block ids"),
        (1, [0, 0, 3], None, "strictly ascending block ids"),
        (2, [0, 4, 3], None, "strictly ascending block ids"),
        (1, [0, 1, 2], None, "every row to hold its diagonal block"),
        (1, [0, 3, -1], 1, "every row to hold its diagonal block"),
        (0, [2, -2, -1], 1, "padding of -1 after each row's count"),
        (2, [0, 4, 1], 2, "padding of -1 after each row's count"),
    ],
)
def test_validate_refuses_every_corruption(row, ids, count, message):
    good().validate()
    with pytest.raises(ValueError, match=f"^selection: expected {message}"):
        corrupted(row, ids, count).validate()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"block_size": 0}, "block_size"),
        ({"q_len": 20}, "q_len"),
        ({"q_len": -1}, "q_len"),
        ({"q_len": 3}, "indices"),
        ({"kv_len": 21}, "indices"),
        ({"indices": torch.zeros(1, 2, 3, 3)}, "indices"),
        ({"indices": torch.zeros(1, 2, 3, 3, dtype=torch.int64)}, "indices"),
        ({"indices": torch.zeros(2, 3, 3, dtype=torch.int32)}, "indices"),
        ({"counts": torch.ones(1, 2, 3)}, "counts"),
        ({"counts": torch.ones(1, 2, 3, dtype=torch.int64)}, "counts"),
        ({"counts": torch.ones(1, 1, 3, dtype=torch.int32)}, "counts"),
        ({"counts": torch.ones(2, 3, dtype=torch.int32)}, "counts"),
    ],
)
def test_building_refuses_wrong_shapes_dtypes_and_lengths(changes, name):
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        dataclasses.replace(good(), **changes)


@pytest.mark.parametrize(
    ("mask", "name"),
    [
        (torch.ones(1, 1, 3, 3), "mask"),
        (torch.ones(1, 3, 3, dtype=torch.bool), "mask"),
        (torch.ones(1, 1, 3, 4, dtype=torch.bool).tril(), "mask"),
        (torch.ones(1, 1, 2, 3, dtype=torch.bool).tril(1), "indices"),
        (torch.ones(1, 1, 3, 3, dtype=torch.bool), "selection"),
        (torch.ones(1, 1, 3, 3, dtype=torch.bool).tril(-1), "selection"),
        (torch.zeros(1, 1, 3, 3, dtype=torch.bool), "selection"),
    ],
)
def test_from_mask_refuses_bad_masks(mask, name):
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        BlockSelection.from_mask(mask, block_size=SIZE, q_len=12, kv_len=12)


@pytest.mark.parametrize(
    ("lists", "name"),
    [
        ([[[[0], [1]]], [[[0], [1]], [[0], [1]]]], "lists"),
        ([[[[0], [1]], [[0]]]], "lists"),
        ([], "lists"),
        ([[[[0]]]], "indices"),
        ([[[[0], [0]]]], "selection"),
        ([[[[0], [1, 2]]]], "selection"),
        ([[[[0], [1, 1]]]], "selection"),
        ([[[[0], []]]], "selection"),
        ([[[[0], [-1, 1]]]], "selection"),
    ],
)
def test_from_lists_refuses_bad_lists(lists, name):
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        BlockSelection.from_lists(lists, block_size=SIZE, q_len=8, kv_len=8)


LENGTHS = {"block_size": SIZE, "q_len": 12, "kv_len": 12}
FULL = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
SHAPE = "(batch, q_heads, rows, key_blocks)"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: dataclasses.replace(good(), block_size=0),
            "block_size: expected an integer >= 1, got 0; pass the tokens per block",
        ),
        (lambda: dataclasses.replace(good(), q_len=-1), "q_len: expected an integer >= 0, got -1; pass the length of q"),
        (lambda: dataclasses.replace(good(), kv_len=None), "kv_len: expected an integer >= 0, got None; pass the length of k"),
        (
            lambda: dataclasses.replace(good(), q_len=20),
            "q_len: expected at most kv_len=19, got 20; queries are the last q_len keys",
        ),
        (
            lambda: dataclasses.replace(good(), indices=[1]),
            "indices: expected an int32 tensor, got list; use from_mask / from_lists",
        ),
        (
            lambda: dataclasses.replace(good(), indices=torch.zeros(1, 2)),
            "indices: expected int32 (batch, q_heads, rows, width), got torch.float32 of shape (1, 2); "
            "convert it, or use from_mask / from_lists",
        ),
        (
            lambda: dataclasses.replace(good(), q_len=3),
            "indices: expected 1 rows for q_len=3, kv_len=19, block_size=4, got 3; "
            "give one row for every query block that the queries touch",
        ),
        (
            lambda: dataclasses.replace(good(), counts=torch.ones(2)),
            "counts: expected int32 (1, 2, 3), got torch.float32 of shape (2,); count the ids of every row",
        ),
        (
            lambda: BlockSelection.from_mask(None, **LENGTHS),
            f"mask: expected bool {SHAPE}, got NoneType; build one entry per block pair",
        ),
        (
            lambda: BlockSelection.from_mask(FULL.int(), **LENGTHS),
            f"mask: expected bool {SHAPE}, got torch.int32 of shape (1, 1, 3, 3); build one entry per block pair",
        ),
        (
            lambda: BlockSelection.from_mask(FULL[..., :2], **LENGTHS),
            "mask: expected 3 key blocks for kv_len=12, block_size=4, got 2; give one column for every key block",
        ),
        (
            lambda: BlockSelection.from_lists([[[[0]]], []], block_size=4, q_len=4, kv_len=4),
            "lists: expected the same heads in every batch entry and rows in every head, "
            "got head counts [0, 1] and row counts [1]; fill the gaps",
        ),
        (
            lambda: BlockSelection.from_lists([[[0]]], block_size=4, q_len=4, kv_len=4),
            "lists: expected sequences of block ids, four deep, got int; nest lists[batch][head][row]",
        ),
        (
            lambda: BlockSelection.from_lists([[[[0.5]]]], block_size=4, q_len=4, kv_len=4),
            "lists: expected integers of 32 bits as block ids, got 0.5; turn them into int",
        ),
        (
            lambda: BlockSelection.from_lists([[[[0]]]], block_size=4, q_len=4, kv_len=4, device="toaster"),
            "device: expected a torch device, got 'toaster'; name one, as in \"cpu\" or \"cuda:0\"",
        ),
        (
            lambda: corrupted(1, [0, 0, 3]).validate(),
            "selection: expected strictly ascending block ids, got something else; build it with from_mask or from_lists",
        ),
    ],
)  # fmt: skip
def test_messages_are_whole(build, message):
    with pytest.raises(ValueError, match="expected") as refused:
        build()
    assert str(refused.value) == message


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
