"""On a Hopper GPU: the warp-specialised kernel where many tasks share a program, and whatever its queue hands out is done."""

from itertools import pairwise

import pytest
import torch
from tests.fuzz.poison import new_memory_is_nan

from stem_attention import BlockSelection, block_sparse_attention, explain
from stem_attention.backends.hopper import BLOCK_SIZES, HEAD_DIMS
from stem_attention.call import Call, PackedBatch
from stem_attention.policies import Dense
from stem_attention.testing import assert_accurate, pack, random_selection

from .common import LENGTHS, on_gpu, random_qkv

pytestmark = on_gpu

SHAPES = [(size, dim) for size in BLOCK_SIZES for dim in HEAD_DIMS]
MANY = [*LENGTHS, (64, 1000)]


@pytest.fixture(autouse=True)
def _hopper():
    found = explain(device="cuda", dtype=torch.bfloat16, backend="hopper")
    if found.chosen is None:
        pytest.skip(found.reasons["hopper"])


def packed_lists(block_size, rows, seed):
    """Lists of every sequence, and all of them in one, with nonsense where no row is."""
    lists = [random_selection(1, 4, a, b, block_size, density=0.4, seed=seed, device="cuda") if a else None for a, b in MANY]
    width = max(x.indices.shape[3] for x in lists if x)
    indices = torch.full((len(MANY), 4, rows, width), 77777, dtype=torch.int32, device="cuda")
    counts = torch.full((len(MANY), 4, rows), 77777, dtype=torch.int32, device="cuda")
    for i, one in enumerate(lists):
        if one:
            indices[i, :, : one.indices.shape[2], : one.indices.shape[3]] = one.indices[0]
            counts[i, :, : one.counts.shape[2]] = one.counts[0]
    return lists, indices, counts


@pytest.mark.parametrize("page", [0, 64, 128, 192])
@pytest.mark.parametrize(("block_size", "dim"), SHAPES)
def test_no_row_of_a_packed_batch_is_lost(block_size, dim, page):
    from stem_attention.backends.hopper.attention import attend
    from stem_attention.backends.triton.layout import Layout
    from stem_attention.backends.triton.program import Launches

    for seed in range(20):
        single = [random_qkv(1, a, b, 4, 2, dim, seed * 10 + i, value_dim=HEAD_DIMS[dim]) for i, (a, b) in enumerate(MANY)]
        packed = pack(single, page)
        tensors = (packed[name] for name in "qkv")
        batch = PackedBatch.plan(*zip(*MANY, strict=True), page_table=packed["page_table"], device=torch.device("cuda"))
        call = Call(*tensors, Dense(block_size), dim**-0.5, batch=batch, return_lse=True)
        launches = Launches()
        layout = Layout.of(call, block_size, launches)
        lists, indices, counts = packed_lists(block_size, layout.rows, seed)
        with new_memory_is_nan():
            out, lse = attend(call, layout, indices, counts, block_size, seed % 3, launches)
        assert out.isfinite().all()
        assert lse.isfinite().all()
        for i, (low, high) in enumerate(pairwise(batch.q_starts)):
            if low < high and seed == 0:
                assert_accurate(out[None, low:high], lse[None, :, low:high], *single[i], lists[i])


@pytest.mark.parametrize(("block_size", "dim"), SHAPES)
def test_a_hundred_runs_of_many_tasks_give_the_same_right_bits(block_size, dim):
    q, k, v = random_qkv(2, 3700, 4000, 16, 4, dim, value_dim=HEAD_DIMS[dim])  # starts at 300, inside a block
    selection = random_selection(2, 16, 3700, 4000, block_size, density=0.1, device="cuda")
    with new_memory_is_nan():
        first = block_sparse_attention(q, k, v, selection, return_lse=True, backend="hopper")
        for _ in range(100):
            again = block_sparse_attention(q, k, v, selection, return_lse=True, backend="hopper")
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for heads, kv_head in ((slice(0, 4), slice(0, 1)), (slice(12, 16), slice(3, 4))):
        part = BlockSelection(selection.indices[:, heads], selection.counts[:, heads], block_size, 3700, 4000)
        out, lse = first[0][:, :, heads], first[1][:, heads]
        assert_accurate(out, lse, q[:, :, heads], k[:, :, kv_head], v[:, :, kv_head], part)


@pytest.mark.parametrize(("block_size", "dim"), SHAPES)
def test_lists_of_odd_and_even_length_read_no_block_beside_theirs(block_size, dim):
    q, k, v = random_qkv(1, 2048, 2048, 2, 1, dim, value_dim=HEAD_DIMS[dim])
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


@pytest.mark.parametrize("lists", ["all beside one", "one beside all", "the same", "none shared"])
@pytest.mark.parametrize("length", [1088, 4096], ids=["odd", "even"])
def test_rows_that_share_a_program_keep_their_own_lists(lists, length):
    """Blocks of 64 at head_dim 128: two rows a program, which fetches once what both keep."""
    rows = length // 64
    mine = {
        "all beside one": lambda row: range(row + 1) if row % 2 else (row,),
        "one beside all": lambda row: (row,) if row % 2 else range(row + 1),
        "the same": lambda row: (*range(0, row, 3), row),
        "none shared": lambda row: (*range(row % 2, row, 2), row),
    }[lists]
    kept = [[sorted(mine(row)) for row in range(rows)]] * 4
    selection = BlockSelection.from_lists([kept], block_size=64, q_len=length, kv_len=length, device="cuda")
    q, k, v = random_qkv(1, length, length, 4, 2, 128)
    out, lse = block_sparse_attention(q, k, v, selection, return_lse=True, backend="hopper")
    assert_accurate(out, lse, q, k, v, selection)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_a_rows_bits_do_not_depend_on_the_row_beside_it(dim):
    q, k, v = random_qkv(1, 1984, 1984, 4, 2, dim)
    mask = random_selection(1, 4, 1984, 1984, 64, density=0.3, device="cuda").to_mask()
    whole, fewer = (
        block_sparse_attention(
            q[:, :n], k[:, :n], v[:, :n],
            BlockSelection.from_mask(mask[:, :, : n // 64, : n // 64], block_size=64, q_len=n, kv_len=n),
            return_lse=True, backend="hopper",
        )
        for n in (1984, 1920)
    )  # fmt: skip
    assert torch.equal(whole[0][:, :1920], fewer[0])
    assert torch.equal(whole[1][:, :, :1920], fewer[1])


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("dim", [64, 128])
def test_scores_that_grow_from_block_to_block_stay_exact(block_size, dim):
    """The running maximum moves at every block, by steps on both sides of those that it may be behind by."""
    q, k, v = random_qkv(1, 1024, 1024, 4, 2, dim)
    rise = torch.linspace(24, 0, 1024 // block_size, device="cuda").repeat_interleave(block_size)
    q[..., 0], k[..., 0] = dim**0.5, rise[None, :, None].to(k.dtype)
    selection = random_selection(1, 4, 1024, 1024, block_size, density=0.6, device="cuda")
    out, lse = block_sparse_attention(q, k, v, selection, return_lse=True, backend="hopper")
    assert_accurate(out, lse, q, k, v, selection)
