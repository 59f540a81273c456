"""Packed batches and calls: where sequences lie, and what is kept with a step."""

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from stem_attention.blocks import BlockGrid
from stem_attention.call import Call, PackedBatch
from stem_attention.policies import Dense
from stem_attention.testing import make_qkv, to_pages

CPU = torch.device("cpu")


def test_a_plan_worked_by_hand():
    batch = PackedBatch.plan([3, 0, 7], [3, 5, 17], device=CPU)
    assert (batch.q_starts, batch.k_starts, batch.prompt_lens) == ((0, 3, 3, 10), (0, 3, 8, 25), (3, 5, 17))
    assert [batch.cu_q.tolist(), batch.cu_k.tolist()] == [[0, 3, 3, 10], [0, 3, 8, 25]]
    assert batch.cu_q.dtype == torch.int32
    assert (batch.sequences, batch.max_q, batch.max_k) == (3, 7, 17)
    assert batch.grid(2, 4) == BlockGrid(7, 17, 4)
    assert PackedBatch.plan([3], [3], prompt_lens=[90], device=CPU).prompt_lens == (90,)


def test_a_batch_of_nothing_has_no_longest_sequence_and_a_page_table_is_stored_row_by_row():
    batch = PackedBatch.plan([], [], device=CPU)
    assert (batch.sequences, batch.max_q, batch.max_k, batch.cu_k.shape) == (0, 0, 0, (1,))
    table = torch.arange(6, dtype=torch.int32).view(3, 2).T
    stored = PackedBatch.plan([1, 1], [1, 1], page_table=table, device=CPU).page_table
    assert torch.equal(stored, table)
    assert stored.stride(1) == 1


def test_tables_begin_where_triton_needs_no_kernel_of_its_own():
    """Triton compiles apart for addresses that are multiples of 16 bytes: all of a server's steps must be alike in that."""
    pages = torch.arange(9 * 7, dtype=torch.int32).view(9, 7)
    for count in range(1, 9):
        batch = PackedBatch.plan([5] * count, [9] * count, page_table=pages[9 - count :], device=CPU)
        assert batch.cu_k.tolist() == [9 * i for i in range(count + 1)]
        assert torch.equal(batch.page_table, pages[9 - count :])
        assert {x.data_ptr() % 16 for x in (batch.cu_q, batch.cu_k, batch.page_table)} == {0}


def test_what_all_layers_of_a_step_need_is_made_once():
    batch, made = PackedBatch.plan([3], [3], device=CPU), []
    assert [batch.once("table", lambda: made.append(1) or 7) for _ in range(3)] == [7, 7, 7]
    assert made == [1]
    assert PackedBatch.plan([3], [3], device=CPU).once("table", lambda: 8) == 8


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30)), min_size=1, max_size=5), st.integers(1, 12))
def test_sequences_are_found_again_packed_and_paged(lengths, page_size):
    spans = [(min(q_len, kv_len), kv_len) for q_len, kv_len in lengths]
    single = [make_qkv(1, *span, 2, 1, 4, seed=i) for i, span in enumerate(spans)]
    q, k, v = (torch.cat(parts, 1)[0] for parts in zip(*single, strict=True))
    (pages_k, table), (pages_v, _) = (to_pages(x, [kv_len for _, kv_len in spans], page_size) for x in (k, v))
    for keys, values, page_table in ((k, v, None), (pages_k, pages_v, table)):
        batch = PackedBatch.plan(*zip(*spans, strict=True), page_table=page_table, device=CPU)
        call = Call(q, keys, values, Dense(), 0.5, batch=batch)
        assert call.paged == (page_table is not None)
        found = list(call.sequences())
        assert [part.prompt_len for _, part in found] == [kv_len for q_len, kv_len in spans if q_len]
        for (queries, part), (one_q, one_k, one_v) in zip(found, [x for x in single if x[0].shape[1]], strict=True):
            assert torch.equal(q[None, queries], one_q)
            assert all(torch.equal(x, y) for x, y in zip((part.q, part.k, part.v), (one_q, one_k, one_v), strict=True))
            assert (part.batch, part.policy, part.scale) == (None, call.policy, call.scale)


def test_a_call_that_is_not_packed_is_one_sequence_and_results_have_the_shape_of_q():
    q, k, v = make_qkv(2, 9, 14, 4, 2, 8, dtype=torch.bfloat16)
    call = Call(q, k, v, Dense(block_size=4), 0.5, 14, return_lse=True)
    assert list(call.sequences()) == [(slice(None), call)]
    assert (call.grid, call.paged) == (BlockGrid(9, 14, 4), False)
    packed = Call(q[0], k[0], v[0], Dense(), 0.5, batch=PackedBatch.plan([9], [14], device=CPU), return_lse=True)
    for one, shape in ((call, (2, 4, 9)), (packed, (4, 9))):
        out, lse = one.empty_results()
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == (one.q.shape, torch.bfloat16, shape, torch.float32)
    assert replace(packed, return_lse=False).empty_lse().shape == (0,)
