"""On a Hopper GPU: the warp-specialised kernel where many tasks share a program, and whatever its queue hands out is done."""

from itertools import pairwise

import pytest
import torch

from stem_attention import BlockSelection, block_sparse_attention, explain
from stem_attention.backends.ragged import Ragged
from stem_attention.testing import exact_attention, random_selection, relative_error, token_mask

from .common import assert_accurate, borders, new_memory_is_nan, on_gpu, paged, random_qkv

pytestmark = on_gpu

SHAPES = [(64, 64), (64, 128), (64, 256), (128, 64), (128, 128), (128, 256)]
LENGTHS = [(300, 300), (1, 4097), (0, 900), (2500, 2500), (1300, 3011), (128, 128), (7, 7), (64, 1000)]


@pytest.fixture(autouse=True)
def _hopper():
    found = explain(device="cuda", dtype=torch.bfloat16, backend="hopper")
    if found.chosen is None:
        pytest.skip(found.reasons["hopper"])


def packed_lists(block_size, seed):
    """Lists of every sequence, and all of them in one, with nonsense where no row is."""
    lists = [random_selection(1, 4, a, b, block_size, density=0.4, seed=seed, device="cuda") if a else None for a, b in LENGTHS]
    rows, width = (max(x.indices.shape[axis] for x in lists if x) for axis in (2, 3))
    indices = torch.full((len(LENGTHS), 4, rows, width), 77777, dtype=torch.int32, device="cuda")
    counts = torch.full((len(LENGTHS), 4, rows), 77777, dtype=torch.int32, device="cuda")
    for i, one in enumerate(lists):
        if one:
            indices[i, :, : one.indices.shape[2], : one.indices.shape[3]] = one.indices[0]
            counts[i, :, : one.counts.shape[2]] = one.counts[0]
    return lists, indices, counts


@pytest.mark.parametrize("page", [0, 64, 128, 192])
@pytest.mark.parametrize(("block_size", "dim"), SHAPES)
def test_no_row_of_a_packed_batch_is_lost(block_size, dim, page):
    from stem_attention.backends.hopper.attention import attend

    cu_q, cu_k = (borders(list(x)) for x in zip(*LENGTHS, strict=True))
    ragged = Ragged(cu_q.cuda(), cu_k.cuda(), 2500, 4097)
    for seed in range(20):
        single = [random_qkv(1, a, b, 4, 2, dim, seed=seed * 10 + i) for i, (a, b) in enumerate(LENGTHS)]
        q, k, v = (torch.cat(x, 1)[0] for x in zip(*single, strict=True))
        lists, indices, counts = packed_lists(block_size, seed)
        table = None
        if page:
            (k, table), (v, _) = paged(k, cu_k, page), paged(v, cu_k, page)
        with new_memory_is_nan():
            out, lse = attend(q, k, v, indices, counts, block_size, dim**-0.5, ragged=ragged, page_table=table, heavy=seed % 3)
        assert out.isfinite().all()
        assert lse.isfinite().all()
        if seed:
            continue
        for i, (low, high) in enumerate(pairwise(cu_q.tolist())):
            if low < high:
                assert_accurate(out[None, low:high], lse[None, :, low:high], *single[i], lists[i])


@pytest.mark.parametrize(("block_size", "dim"), SHAPES)
def test_a_hundred_runs_of_many_tasks_give_the_same_right_bits(block_size, dim):
    q, k, v = random_qkv(2, 3700, 4000, 16, 4, dim)  # starts at 300, inside a block
    selection = random_selection(2, 16, 3700, 4000, block_size, density=0.1, device="cuda")
    with new_memory_is_nan():
        first = block_sparse_attention(q, k, v, selection, return_lse=True, backend="hopper")
        for _ in range(100):
            again = block_sparse_attention(q, k, v, selection, return_lse=True, backend="hopper")
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    parts = [
        BlockSelection(selection.indices[:, heads], selection.counts[:, heads], block_size, 3700, 4000)
        for heads in (slice(0, 4), slice(12, 16))
    ]
    for part, heads, kv_head in zip(parts, (slice(0, 4), slice(12, 16)), (slice(0, 1), slice(3, 4)), strict=True):
        out, lse = first[0][:, :, heads], first[1][:, heads]
        assert_accurate(out, lse, q[:, :, heads], k[:, :, kv_head], v[:, :, kv_head], part)


@pytest.mark.parametrize(("block_size", "dim"), SHAPES)
def test_lists_of_odd_and_even_length_read_no_block_beside_theirs(block_size, dim):
    q, k, v = random_qkv(1, 2048, 2048, 2, 1, dim)
    rows = range(2048 // block_size)
    kept = [[sorted({0, row, *range(2, row, 1 + head)} - ({1} if row > 1 else set())) for row in rows] for head in range(2)]
    assert {len(row) % 2 for row in kept[0]} == {0, 1}
    selection = BlockSelection.from_lists([kept], block_size=block_size, q_len=2048, kv_len=2048, device="cuda")
    clean = block_sparse_attention(q, k, v, selection, backend="hopper")
    skipped = slice(block_size, 2 * block_size)
    k[:, skipped], v[:, skipped] = torch.inf, torch.nan
    out = block_sparse_attention(q, k, v, selection, backend="hopper")
    for tokens in (slice(0, block_size), slice(2 * block_size, None)):
        assert torch.equal(out[:, tokens], clean[:, tokens])


@pytest.mark.parametrize(("block_size", "dim"), SHAPES)
def test_nonsense_in_lists_and_counts_stays_inside_the_keys(block_size, dim):
    q, k, v = random_qkv(1, 700, 900, 4, 2, dim)
    selection = random_selection(1, 4, 700, 900, block_size, device="cuda")
    for number in (1 << 20, -(1 << 20)):
        indices, counts = (torch.full_like(x, number) for x in (selection.indices, selection.counts))
        for wild in ((indices, counts), (indices, selection.counts)):
            out = block_sparse_attention(q, k, v, BlockSelection(*wild, block_size, 700, 900), backend="hopper")
            assert out.isfinite().all()


@pytest.mark.parametrize(("block_size", "dim"), SHAPES)
def test_of_many_numbers_the_error_is_at_most_a_tenth_above_that_of_sdpa(block_size, dim):
    """Without the slack of ``assert_accurate``: the mean of a million errors is no matter of chance."""
    q, k, v = random_qkv(1, 8000, 8000, 4, 2, dim)
    selection = random_selection(1, 4, 8000, 8000, block_size, density=0.2, device="cuda")
    mask = token_mask(selection)
    exact, _ = exact_attention(q, k, v, mask)
    repeated = (x.transpose(1, 2).repeat_interleave(2, 1) for x in (k, v))
    sdpa = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), *repeated, attn_mask=mask).transpose(1, 2)
    out = block_sparse_attention(q, k, v, selection, backend="hopper")
    assert relative_error(out, exact) <= 1.1 * relative_error(sdpa, exact)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_strides_that_the_copy_engine_cannot_take_run_portably(dim):
    q, k, v = random_qkv(1, 700, 900, 4, 2, dim)
    odd = torch.nn.functional.pad(k, (1, 2))[..., 1:-2]  # rows of dim + 3 numbers, the first at an odd address
    selection = random_selection(1, 4, 700, 900, 128, device="cuda")
    out, lse = block_sparse_attention(q, odd, v, selection, return_lse=True, backend="hopper")
    assert_accurate(out, lse, q, k, v, selection)


@pytest.mark.parametrize("backend", ["hopper", "triton"])
def test_keys_that_sequences_share_run_through_pointers(backend):
    q, k, v = random_qkv(2, 700, 900, 4, 2, 128)
    shared = [x[:1].expand(2, -1, -1, -1) for x in (k, v)]
    selection = random_selection(2, 4, 700, 900, 128, device="cuda")
    out, lse = block_sparse_attention(q, *shared, selection, return_lse=True, backend=backend)
    assert_accurate(out, lse, q, *shared, selection)
