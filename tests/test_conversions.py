"""A selection as FlexAttention, FlashAttention-4 and NVIDIA's cudnn-frontend write it, and back."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from stem_attention import BlockSelection, block_sparse_attention
from stem_attention.testing import random_selection, structured_qkv, token_mask, worst_row_error

SIZE = 16
# Whole blocks, a last block that is not whole, fewer queries than keys, a first query inside a block, one row, one query.
LENGTHS = [(64, 64), (70, 70), (48, 112), (37, 101), (70, 101), (90, 133), (5, 133), (16, 16), (1, 40), (3, 3)]
ALIGNED = [(q_len, kv_len) for q_len, kv_len in LENGTHS if (kv_len - q_len) % SIZE == 0]


def same(a, b):
    lengths = [(s.block_size, s.q_len, s.kv_len) for s in (a, b)]
    return lengths[0] == lengths[1] and torch.equal(a.to_mask(), b.to_mask())


def flex(q, k, v, mask, scale=None):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=True, scale=scale).transpose(1, 2)


@pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS)
def test_flex_attention_under_the_mask_is_block_sparse_attention(q_len, kv_len):
    q, k, v = structured_qkv(2, q_len, kv_len, 4, 2, 16, dtype=torch.float64)
    selection = random_selection(2, 4, q_len, kv_len, SIZE)
    expected = block_sparse_attention(q, k, v, selection)
    assert worst_row_error(flex(q, k, v, selection.to_block_mask()), expected) < 1e-12


def listed(counts, indices):
    """Bool mask of lists."""
    mask = torch.zeros(*counts.shape, indices.shape[-1], dtype=torch.bool)
    for at in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
        mask[tuple(at)][indices[tuple(at)][: counts[tuple(at)]].long()] = True
    return mask


@pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS)
def test_the_lists_of_a_block_mask_say_what_its_function_says(q_len, kv_len):
    """Eager FlexAttention reads the function alone, compiled FlexAttention skips what is not listed and does not mask what is
    full: on all tokens of every block."""
    selection = random_selection(1, 2, q_len, kv_len, SIZE)
    mask = selection.to_block_mask()
    partial = listed(mask.kv_num_blocks, mask.kv_indices)
    full = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    shown = token_mask(selection)
    rows, columns = -(-q_len // SIZE), -(-kv_len // SIZE)
    assert mask.seq_lengths == (q_len, kv_len)
    assert full.shape == partial.shape == (1, 2, rows, columns)
    for head in range(2):
        for row in range(rows):
            for column in range(columns):
                tokens = shown[0, head, row * SIZE : (row + 1) * SIZE, column * SIZE : (column + 1) * SIZE]
                assert bool(full[0, head, row, column] | partial[0, head, row, column]) == bool(tokens.any())
                assert not full[0, head, row, column] or bool(tokens.all())
    assert not bool((full & partial).any())
    if (kv_len - q_len) % SIZE == 0:
        assert torch.equal(mask.kv_num_blocks, torch.ones(1, 2, rows, dtype=torch.int32)), "only the diagonal is partial"


@pytest.mark.parametrize(("q_len", "kv_len"), ALIGNED)
def test_every_form_comes_back(q_len, kv_len):
    selection = random_selection(2, 4, q_len, kv_len, SIZE)
    lengths = {"q_len": q_len, "kv_len": kv_len}
    assert same(BlockSelection.from_block_mask(selection.to_block_mask()), selection)
    fa4 = SimpleNamespace(**selection.to_fa4())
    assert same(BlockSelection.from_fa4(fa4, batch=2, q_heads=4, **lengths), selection)
    assert same(BlockSelection.from_cudnn(**selection.to_cudnn(), **lengths), selection)


def test_fa4_and_cudnn_get_the_lists_themselves():
    selection = BlockSelection.from_lists([[[[0, 2], [1, 3]]]], block_size=SIZE, q_len=32, kv_len=64)
    fa4 = selection.to_fa4()
    assert fa4["block_size"] == (SIZE, SIZE)
    assert fa4["mask_block_idx"].flatten().tolist() == [2, 3]
    assert fa4["mask_block_cnt"].flatten().tolist() == [1, 1]
    assert fa4["full_block_cnt"].flatten().tolist() == [1, 1]
    assert fa4["full_block_idx"].tolist() == [[[[0, 2], [1, 3]]]]
    cudnn = BlockSelection.from_lists([[[[2], [1, 3]]]], block_size=SIZE, q_len=32, kv_len=64).to_cudnn()
    assert cudnn["q2k_block_nums"].flatten().tolist() == [1, 2]
    assert cudnn["q2k_block_index"].tolist() == [[[[2, 0], [1, 3]]]], "no id is out of range, padding included"
    assert cudnn["sparse_block_size"] == SIZE


@pytest.mark.parametrize("batch", [None, 2])
def test_a_mask_that_torch_built_is_read_and_holds_for_all_heads(batch):
    def mask_mod(batch, head, query, key):
        return (key <= query) & ((key // SIZE == query // SIZE) | (key // SIZE == 1))

    mask = create_block_mask(mask_mod, batch, None, 70, 70, device="cpu", BLOCK_SIZE=SIZE)
    selection = BlockSelection.from_block_mask(mask, batch=2, q_heads=4)
    q, k, v = structured_qkv(2, 70, 70, 4, 2, 16, dtype=torch.float64)
    assert worst_row_error(block_sparse_attention(q, k, v, selection), flex(q, k, v, mask)) < 1e-12


@pytest.mark.parametrize(
    ("mask_mod", "size"),
    [
        (lambda b, h, q, k: (k <= q) & (k > q - 20), SIZE),  # a window's edge is partial below the diagonal
        (lambda b, h, q, k: k >= 0, SIZE),  # the diagonal is whole
        (lambda b, h, q, k: (k <= q) & (k >= 16), SIZE),  # the first row keeps nothing
        (lambda b, h, q, k: k <= q, (2 * SIZE, SIZE)),
    ],
)
def test_a_mask_that_no_selection_can_say_is_refused(mask_mod, size):
    mask = create_block_mask(mask_mod, None, None, 64, 64, device="cpu", BLOCK_SIZE=size)
    with pytest.raises(ValueError, match=r"^(mask|selection|block_size): expected .*; "):
        BlockSelection.from_block_mask(mask)


@pytest.mark.parametrize("convert", [BlockSelection.to_fa4, BlockSelection.to_cudnn])
def test_rows_that_would_begin_elsewhere_are_refused(convert):
    with pytest.raises(ValueError, match=r"^q_len: expected .*block_size=16.*border"):
        convert(random_selection(1, 2, 37, 102, SIZE))
    mask = random_selection(1, 2, 37, 102, SIZE).to_block_mask()
    with pytest.raises(ValueError, match=r"^q_len: expected "):
        BlockSelection.from_block_mask(mask)


@pytest.mark.parametrize("bad", [7, -1])
def test_an_id_that_is_no_block_is_refused(bad):
    index = torch.tensor([[[[bad]]]], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^mask: expected ids of 1 key blocks"):
        BlockSelection.from_cudnn(index, torch.ones(1, 1, 1, dtype=torch.int32), SIZE, q_len=5, kv_len=5)


def test_a_block_mask_is_a_block_mask():
    assert isinstance(random_selection(1, 2, 40, 40, SIZE).to_block_mask(), BlockMask)


def test_a_window_that_cuts_a_block_of_an_unfinished_last_row_is_no_selection():
    window = create_block_mask(lambda b, h, i, j: (j <= i) & (j > i - 150), None, None, 228, 228, device="cpu", BLOCK_SIZE=128)
    with pytest.raises(ValueError, match="mask: expected whole blocks below the diagonal"):
        BlockSelection.from_block_mask(window)
