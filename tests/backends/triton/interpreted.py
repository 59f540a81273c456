"""The Triton kernels on the CPU, by Triton's interpreter, against the reference. Run by test_triton_interpreter.py.

Views, poison and malformed lists are not tried here: tests/trust runs in the interpreter too.
Its name keeps pytest from collecting it: the interpreter must be chosen before Triton is imported, for a whole process.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from tests.rigs import peaked
from torch import Tensor

from stem_attention import BlockSelection, Mass, Policy, Stem
from stem_attention.backends.kept import pack as eager_pack
from stem_attention.backends.reference import ReferenceBackend
from stem_attention.backends.triton import TritonBackend, attention, backward, layout, packing, pieces
from stem_attention.backends.triton.kept import list_columns, list_rows
from stem_attention.backends.triton.layout import Layout
from stem_attention.backends.triton.program import Launches
from stem_attention.call import Call, PackedBatch
from stem_attention.policies.ranked import choose as eager_choose
from stem_attention.testing import make_qkv, pack, random_selection, relative_error, to_pages, worst_row_error

from .choosing import choose

REFERENCE = ReferenceBackend()
SMALL = Stem(block_size=16, stride=4, ratio_short=0.3, sink_blocks=1, local_blocks=2, min_blocks=3, tail_blocks=1)


def select(
    q: Tensor, k: Tensor, v: Tensor, policy: Policy, prompt_len: int = 0, *, batch: PackedBatch | None = None,
    implicit: bool = False, kept: Tensor | None = None, softcap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Indices and counts as the kernels write them."""
    call = Call(q, k, v, policy, q.shape[-1] ** -0.5, prompt_len, batch, kept=kept, softcap=softcap)
    selector = TritonBackend().selector(policy)
    assert selector is not None
    launches = Launches()
    return selector(call, Layout.of(call, policy.block_size, launches), 0, implicit, launches)


def selected(
    q: Tensor, k: Tensor, v: Tensor, policy: Policy, prompt_len: int | None = None, softcap: float | None = None
) -> BlockSelection:
    indices, counts = select(q, k, v, policy, k.shape[1] if prompt_len is None else prompt_len, softcap=softcap)
    selection = BlockSelection(indices, counts, policy.block_size, q.shape[1], k.shape[1])
    selection.validate()
    return selection


def attend(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, block_size: int, *, batch: PackedBatch | None = None,
    return_lse: bool = True, heavy: int = 0, **extra: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    policy, scale = Stem(block_size=block_size, stride=1), extra.pop("scale", q.shape[-1] ** -0.5)
    call, launches = Call(q, k, v, policy, scale, batch=batch, return_lse=return_lse, **extra), Launches()
    return attention.attend(call, Layout.of(call, block_size, launches), indices, counts, block_size, heavy, launches)


def attended(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, *, return_lse: bool = True, heavy: int = 0, **extra: Any
) -> tuple[Tensor, Tensor]:
    lists = selection.indices, selection.counts, selection.block_size
    return attend(q, k, v, *lists, return_lse=return_lse, heavy=heavy, **extra)


def keeps_what_the_reference_keeps(
    q: Tensor, k: Tensor, v: Tensor, policy: Policy, prompt_len: int | None = None, softcap: float | None = None
) -> BlockSelection:
    got, length = selected(q, k, v, policy, prompt_len, softcap), k.shape[1] if prompt_len is None else prompt_len
    call = Call(q, k, v, policy, q.shape[3] ** -0.5, length, softcap=softcap)
    assert torch.equal(got.to_mask(), REFERENCE.select(call).to_mask())
    return got


def exact(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, **extra: Any) -> tuple[Tensor, Tensor]:
    scale = extra.pop("scale", q.shape[3] ** -0.5)
    return REFERENCE.attend(Call(q, k, v, Stem(), scale, return_lse=True, **extra), selection)


@pytest.mark.parametrize(
    ("config", "batch", "q_len", "kv_len", "heads", "dim"),
    [
        (SMALL, 2, 90, 149, (4, 2), 32),
        (replace(SMALL, magnitude="zscore", forced="extra"), 2, 149, 149, (2, 1), 16),
        (replace(SMALL, magnitude="none"), 1, 45, 160, (3, 1), 24),
        (replace(SMALL, block_size=32, stride=8, beta=0.0), 1, 77, 200, (2, 2), 24),
        (replace(SMALL, forced="extra", tail_blocks=0), 1, 161, 161, (1, 1), 16),
        (Stem.angelslim(block_size=16), 1, 930, 930, (1, 1), 16),
    ],
    ids=["log", "zscore-extra", "none", "block-32", "extra", "angelslim"],
)
def test_selection_is_the_references(config, batch, q_len, kv_len, heads, dim):
    selection = keeps_what_the_reference_keeps(*make_qkv(batch, q_len, kv_len, *heads, dim), config)
    assert selection.density() < 1


BY_MASS = Mass(block_size=16, query_pool=4, key_pool=8, tail_blocks=1, local_blocks=1, share=1.5, spread=0.1)


@pytest.mark.parametrize(
    ("config", "shape", "prompt_len"),
    [
        (BY_MASS, (2, 90, 149, 4, 2, 32), 149),
        (replace(BY_MASS, query_pool=16, key_pool=16), (1, 45, 160, 3, 1, 24), 400),
        (replace(BY_MASS, query_pool=2, key_pool=1, share=8.0), (1, 161, 161, 1, 1, 16), 161),
        (replace(BY_MASS, sink_blocks=0, tail_blocks=0), (1, 200, 200, 2, 1, 16), 200),
        (replace(BY_MASS, spread=0.0), (1, 120, 120, 2, 1, 16), 120),
        (replace(BY_MASS, head_factors=((0.2, 1.0, 1.7, 6.0),)), (2, 90, 149, 4, 2, 32), 300),
    ],
    ids=["chunk", "whole-blocks", "single-keys", "no-sink", "means-alone", "factors"],
)
def test_selection_by_mass_is_the_references(config, shape, prompt_len):
    dtype = torch.float16 if shape[0] == 2 else torch.float32
    assert keeps_what_the_reference_keeps(*peaked(*shape, dtype=dtype), config, prompt_len).density() < 1


@pytest.mark.parametrize(
    ("policy", "softcap"), [(replace(SMALL, beta=1.0, min_blocks=6), 0.1), (BY_MASS, 3.0), (replace(BY_MASS, spread=0.0), 3.0)],
    ids=["stem", "mass", "means-alone"],
)  # fmt: skip
def test_a_selection_under_a_soft_cap_is_the_references(policy, softcap):
    q, k, v = peaked(1, 90, 149, 2, 1, 32)
    v[:, 20:50] *= 30  # values decide where scores are small
    under, without = (keeps_what_the_reference_keeps(q, k, v, policy, softcap=cap).to_mask() for cap in (softcap, None))
    assert not torch.equal(under, without)


def test_a_poisoned_key_is_kept_by_mass():
    q, k, v = peaked(1, 160, 160, 1, 1, 16)
    k[0, 40] = math.nan
    assert keeps_what_the_reference_keeps(q, k, v, BY_MASS).to_mask()[0, 0, 3:, 2].all()


def test_each_head_keeps_what_its_own_share_keeps():
    q, k, v = peaked(1, 160, 160, 3, 1, 16)
    factors = (0.2, 1.7, 6.0)
    together = selected(q, k, v, replace(BY_MASS, head_factors=(factors,))).to_mask()
    kept = []
    for head, factor in enumerate(factors):
        alone = selected(q, k, v, replace(BY_MASS, share=1.5 * factor)).to_mask()
        assert torch.equal(together[:, head], alone[:, head])
        kept.append(int(alone[:, head].sum()))
    assert kept[0] > kept[1] > kept[2]  # or these factors show nothing


@pytest.mark.parametrize(("page", "factors"), [(0, None), (1, ((0.2, 5.0),)), (12, None)])
def test_a_packed_batch_keeps_by_mass_what_each_sequence_keeps(page, factors):
    config = replace(BY_MASS, head_factors=factors)
    lengths = [(40, 90), (0, 20), (69, 69), (3, 50)]
    single = [peaked(1, q_len, kv_len, 2, 1, 16) for q_len, kv_len in lengths]
    q, k, v, batch = packed(single, page)
    kept = torch.ones(1, dtype=torch.int64)
    indices, counts = select(q, k, v, config, batch=batch, kept=kept)
    assert int(kept) == 1 + int(counts.sum())
    for i, (one_q, one_k, one_v) in enumerate(single):
        if lengths[i][0]:
            alone = selected(one_q, one_k, one_v, config)
            rows = alone.rows
            assert torch.equal(counts[i, :, :rows], alone.counts[0])
            assert torch.equal(indices[i, :, :rows, : alone.indices.shape[3]], alone.indices[0])


@pytest.mark.parametrize("kv_len", [1, 15, 16, 17, 33])
def test_prompts_of_any_length_have_a_selection(kv_len):
    keeps_what_the_reference_keeps(*make_qkv(1, kv_len, kv_len, 2, 1, 16), SMALL)
    keeps_what_the_reference_keeps(*make_qkv(1, 1, kv_len, 2, 1, 16), SMALL)


@pytest.mark.parametrize("magnitude", ["log", "none"])
def test_equal_scores_keep_the_smaller_ids(magnitude):
    q, k, v = (torch.ones(1, 160, 1, 16) for _ in range(3))
    selection = keeps_what_the_reference_keeps(q, k, v, replace(SMALL, magnitude=magnitude))
    assert selection.indices[0, 0, 8, :3].tolist() == [0, 7, 8]
    roomy = selected(q, k, v, replace(SMALL, magnitude=magnitude, min_blocks=5, decay=1.0))
    assert roomy.indices[0, 0, 8, :5].tolist() == [0, 1, 2, 7, 8]


@pytest.mark.parametrize("magnitude", ["log", "zscore"])
def test_a_block_with_nan_in_its_values_ranks_first(magnitude):
    q, k, v = make_qkv(1, 160, 160, 2, 1, 16)
    v[0, 70, 0, 3] = math.nan
    config = replace(SMALL, magnitude=magnitude, min_blocks=4)
    if magnitude == "log":
        mask = keeps_what_the_reference_keeps(q, k, v, config).to_mask()
        assert mask[:, :, 4:, 70 // 16].all()
    else:  # the statistics of the whole sequence are NaN, and with them every score: ties, so the smaller ids
        keeps_what_the_reference_keeps(q, k, v, config)


@pytest.mark.parametrize("first_row", [0, 7])
def test_scores_of_any_policy_are_chosen_from_like_the_eager_twin(first_row):
    scores = torch.randint(-3, 4, (1, 2, 40, first_row + 40)).float()  # many ties
    scores[0, 0, 5, 2], scores[0, 1, 30, 9] = math.nan, -math.inf
    budgets = [min(first_row + row + 1, max(5, 9 - row // 8)) for row in range(40)]
    indices, counts = choose(scores, first_row, budgets, 2, 3)
    assert torch.equal(indices.long(), eager_choose(scores, first_row, budgets, 2, 3))
    assert torch.equal(counts.long(), torch.tensor(budgets).expand(1, 2, -1))


def test_infinite_scores_are_ranked():
    """Spelt out, since the reference multiplies by a mask, and infinity times zero is NaN."""
    q, k, v = make_qkv(1, 160, 160, 1, 1, 16)
    q[:] = 1
    k[:, 32:48], k[:, 64:80] = -math.inf, math.inf
    mask = selected(q, k, v, replace(SMALL, min_blocks=5, decay=1.0, magnitude="none")).to_mask()[0, 0]
    assert mask[6:9, 4].all()
    assert not mask[6:9, 2].any()


def test_a_small_workspace_changes_no_block(monkeypatch):
    q, k, v = make_qkv(1, 150, 201, 2, 1, 16)
    whole = selected(q, k, v, SMALL)
    monkeypatch.setattr(layout, "WORKSPACE_BYTES", 4 * 2 * (4 * 16 + 16) * 4)  # some four rows
    chunked = selected(q, k, v, SMALL)
    assert torch.equal(chunked.indices, whole.indices)
    assert torch.equal(chunked.counts, whole.counts)


@pytest.mark.parametrize("forced", ["inside", "extra"])
def test_chunks_of_a_prompt_keep_what_one_call_keeps(forced):
    q, k, v = make_qkv(1, 200, 200, 2, 1, 16)
    config = replace(SMALL, forced=forced)
    whole = selected(q, k, v, config).to_mask()
    for low, high in ((0, 64), (64, 144), (144, 200)):
        part = selected(q[:, low:high], k[:, :high], v[:, :high], config, prompt_len=200).to_mask()
        rows = slice(low // 16, -(-high // 16))
        assert torch.equal(part, whole[:, :, rows, : part.shape[3]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("batch", "q_len", "kv_len", "heads", "dim", "block_size"),
    [(2, 40, 77, (4, 2), 32, 16), (1, 97, 97, (7, 1), 24, 32), (1, 1, 65, (2, 2), 16, 16), (1, 16, 16, (1, 1), 16, 16)],
)
def test_attention_over_any_lists(batch, q_len, kv_len, heads, dim, block_size, dtype):
    q, k, v = make_qkv(batch, q_len, kv_len, *heads, dim, dtype)
    selection = random_selection(batch, heads[0], q_len, kv_len, block_size)
    out, lse = attended(q, k, v, selection)
    expected, expected_lse = exact(q.double(), k.double(), v.double(), selection)
    assert worst_row_error(out, expected) < (1e-5 if dtype == torch.float32 else 4e-3)
    torch.testing.assert_close(lse, expected_lse.float(), atol=1e-5, rtol=1e-5)


SINKS = torch.tensor([0.4, -math.inf, -3.0, 30.0])  # the last outweighs all keys, the second is none


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attention_with_sinks(dtype):
    q, k, v = make_qkv(2, 40, 77, 4, 2, 32, dtype)
    selection = random_selection(2, 4, 40, 77, 16)
    out, lse = attended(q, k, v, selection, sinks=SINKS.to(dtype))
    expected, expected_lse = exact(q.double(), k.double(), v.double(), selection, sinks=SINKS.to(dtype).double())
    assert worst_row_error(out[:, :, :3], expected[:, :, :3]) < (1e-5 if dtype == torch.float32 else 4e-3)
    torch.testing.assert_close(out[:, :, 3].double(), expected[:, :, 3], atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse.float(), atol=1e-5, rtol=1e-5)
    assert torch.equal(out[:, :, 1], attended(q, k, v, selection)[0][:, :, 1])


@pytest.mark.parametrize(("dim", "value_dim", "page"), [(32, 16, 0), (24, 48, 12), (16, 40, 12)])
def test_values_of_another_dimension(dim, value_dim, page):
    """Selection and attention, of a call and of each sequence of a packed batch."""
    lengths = ((20, 20), (0, 30), (18, 75))
    single = [make_qkv(1, a, b, 2, 1, dim, seed=i, value_dim=value_dim) for i, (a, b) in enumerate(lengths)]
    q, k, v, batch = packed(single, page)
    indices, counts = select(q, k, v, SMALL, batch=batch)
    out, _ = attend(q, k, v, indices, counts, 16, batch=batch)
    assert out.shape == (len(q), 2, value_dim)
    for i, (low, high) in enumerate(pairwise(batch.q_starts)):
        if low < high:
            alone = keeps_what_the_reference_keeps(*single[i], SMALL)
            expected = exact(*single[i], alone)[0]
            torch.testing.assert_close(attended(*single[i], alone)[0], expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(out[low:high], expected[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.7, -0.7, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attention_with_a_soft_cap(dtype, scale):
    q, k, v = peaked(2, 40, 77, 4, 2, 32, dtype=dtype)
    selection = random_selection(2, 4, 40, 77, 16)
    extra = {"softcap": 5.0, "scale": scale}
    out, lse = attended(q, k, v, selection, sinks=SINKS, **extra)
    expected, expected_lse = exact(q.double(), k.double(), v.double(), selection, sinks=SINKS.double(), **extra)
    assert worst_row_error(out[:, :, :3], expected[:, :, :3]) < (1e-5 if dtype == torch.float32 else 4e-3)
    torch.testing.assert_close(lse, expected_lse.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("page", "window"), [*((None, window) for window in (1, 16, 17, 31, 64, 500)), (0, 17), (0, 500), (16, 1), (16, 64)]
)
def test_attention_under_a_window(page, window):
    """A rectangular batch (None), a packed one (0), one in pages; over the blocks that the window touches and others."""
    q, k, v = make_qkv(1, 50, 101, 2, 1, 16, torch.float32)
    band = BlockSelection.of_window(window, block_size=16, q_len=50, kv_len=101, q_heads=2)
    for selection in (band, random_selection(1, 2, 50, 101, 16)):
        expected, norms = REFERENCE.attend(Call(q, k, v, SMALL, 0.25, 101, return_lse=True, window=window), selection)
        lists = selection.indices.contiguous(), selection.counts.contiguous(), 16
        if page is None:
            out, lse = attend(q, k, v, *lists, window=window)
        else:
            packed, table = (q[0], k[0], v[0]), None
            if page:
                (keys, table), (values, _) = (to_pages(x[0], [101], page) for x in (k, v))
                packed = q[0], keys, values
            batch = PackedBatch.plan([50], [101], page_table=table, device=q.device)
            # Wherever 50 queries begin, they touch at most five blocks: here four.
            padded = [torch.nn.functional.pad(x, (0, 0) * (x.dim() == 4) + (0, 1)) for x in lists[:2]]
            out, lse = (x[None] for x in attend(*packed, *padded, 16, batch=batch, window=window))
        assert worst_row_error(out, expected) < 1e-5
        torch.testing.assert_close(lse, norms, rtol=1e-5, atol=1e-5)


def test_without_lse_none_is_written():
    q, k, v = make_qkv(1, 50, 83, 2, 1, 16)
    selection = random_selection(1, 2, 50, 83, 16)
    out, lse = attended(q, k, v, selection, return_lse=False)
    assert lse.numel() == 0
    assert torch.equal(out, attended(q, k, v, selection)[0])


@pytest.mark.parametrize("heavy", [1, 3, 99])
def test_the_order_of_rows_changes_nothing(heavy):
    q, k, v = make_qkv(1, 50, 70, 2, 2, 16)
    selection = random_selection(1, 2, 50, 70, 16)
    assert torch.equal(attended(q, k, v, selection, heavy=heavy)[0], attended(q, k, v, selection)[0])


@pytest.mark.parametrize(
    ("config", "q_len", "kv_len", "prompt_len"),
    [
        (SMALL, 90, 149, 149),
        (replace(SMALL, forced="extra"), 149, 149, 149),
        # The rows of this chunk may keep everything and do not: their forced blocks overlap the chosen ones.
        (replace(SMALL, forced="extra", ratio_short=0.4, sink_blocks=3, local_blocks=3), 48, 192, 400),
        (replace(SMALL, ratio_short=1.0, ratio_long=1.0, decay=1.0), 100, 100, 100),
    ],
)
def test_rows_that_keep_everything_need_no_list(config, q_len, kv_len, prompt_len):
    q, k, v = make_qkv(1, q_len, kv_len, 2, 1, 16)
    explicit = selected(q, k, v, config, prompt_len)
    indices, counts = select(q, k, v, config, prompt_len, implicit=True)
    assert torch.equal(counts, explicit.counts)
    out, _ = attend(q, k, v, indices, counts, config.block_size)
    assert torch.equal(out, attended(q, k, v, explicit)[0])


LENGTHS = ((20, 20), (1, 77), (0, 30), (33, 101), (16, 16))


Problem = tuple[Tensor, Tensor, Tensor]


def packed(single: list[Problem], page: int = 0, still_to_come: int = 0) -> tuple[Tensor, Tensor, Tensor, PackedBatch]:
    """Sequences packed; with pages, shuffled ones, NaN wherever no key lies."""
    given = pack(single, page)
    q_lens, kv_lens = ([x[i].shape[1] for x in single] for i in (0, 1))
    prompts = [length + still_to_come for length in kv_lens]
    q, k, v, table = (given[name] for name in ("q", "k", "v", "page_table"))
    return q, k, v, PackedBatch.plan(q_lens, kv_lens, prompt_lens=prompts, page_table=table, device=q.device)


def some() -> list[Problem]:
    return [make_qkv(1, a, b, 2, 1, 16, seed=i) for i, (a, b) in enumerate(LENGTHS)]


@pytest.mark.parametrize(("page", "forced"), [(0, "inside"), (1, "inside"), (16, "inside"), (16, "extra")])
def test_a_packed_batch_gives_what_each_sequence_gives(page, forced):
    config = replace(SMALL, forced=forced)
    single = some()
    q, k, v, batch = packed(single, page)
    indices, counts = select(q, k, v, config, batch=batch)
    out, lse = attend(q, k, v, indices, counts, 16, batch=batch)
    for i, (low, high) in enumerate(pairwise(batch.q_starts)):
        if low == high:
            assert not counts[i].any()
            continue
        alone = selected(*single[i], config)
        assert torch.equal(counts[i, :, : alone.rows], alone.counts[0])
        assert not counts[i, :, alone.rows :].any()
        for h, row in ((h, row) for h in range(2) for row in range(alone.rows)):
            count = int(alone.counts[0, h, row])
            assert torch.equal(indices[i, h, row, :count], alone.indices[0, h, row, :count])
            assert (indices[i, h, row, count:] == -1).all()
        expected, expected_lse = exact(*single[i], alone)
        torch.testing.assert_close(out[low:high], expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse[:, low:high], expected_lse[0], atol=1e-5, rtol=1e-5)


def test_pages_and_neighbours_change_no_bit():
    single = some()

    def run(problems: list[Problem], page: int = 0) -> tuple[Tensor, Tensor]:
        q, k, v, batch = packed(problems, page, still_to_come=40)  # chunks: more of every prompt is still to come
        indices, counts = select(q, k, v, SMALL, batch=batch, implicit=True)
        return attend(q, k, v, indices, counts, 16, batch=batch)

    out, lse = run(single)
    for page in (1, 16, 64):
        assert all(map(torch.equal, run(single, page), (out, lse)))
    starts = [0, *accumulate(a for a, _ in LENGTHS)]
    for i, (low, high) in enumerate(pairwise(starts)):
        if low < high:
            assert all(map(torch.equal, run(single[i : i + 1]), (out[low:high], lse[:, low:high])))


@pytest.mark.parametrize("by_head", [False, True])
def test_an_fp8_cache_is_packed_as_the_twin_packs_it(by_head):
    lengths, scales = [5, 70, 130], torch.tensor([0.02, 0.7] if by_head else 0.3)
    x = torch.randn(2, sum(lengths), 2, 24, generator=torch.Generator().manual_seed(1)).mul(60).to(torch.float8_e4m3fn)
    (k, table), (v, _) = (to_pages(part.view(torch.uint8), lengths, 16, fill=0) for part in x)
    k, v = k.view(x.dtype), v.view(x.dtype)
    batch = PackedBatch.plan(lengths, lengths, page_table=table, device=k.device)
    call = Call(torch.empty(sum(lengths), 2, 24), k, v, SMALL, 1.0, batch=batch, k_scale=scales, v_scale=2 * scales)
    for part, read, scale in zip(x, packing.packed(call, Launches()), (scales, 2 * scales), strict=True):
        assert torch.equal(read, part.float() * scale.view(-1, 1))


@pytest.mark.parametrize("page", [1, 7])
def test_pages_of_any_size_are_packed(page):
    q, k, v, batch = packed(some(), page)
    call = Call(q, k, v, SMALL, 1.0, batch=batch)
    expected = (torch.cat([batch.sequence(x, i) for i in range(batch.sequences)]) for x in (k, v))
    assert all(map(torch.equal, packing.packed(call, Launches()), expected))


def gradients_agree(call: Call, kept: Tensor, results: tuple[Tensor, Tensor], bound: float = 2e-6) -> tuple[Tensor, ...]:
    """Gradients by the kernels, once they are those of the reference's autograd in fp64."""
    draw = torch.Generator().manual_seed(1)
    d_results = tuple(torch.randn(x.shape, generator=draw).to(x.dtype) for x in results)
    found = TritonBackend().backward(call, kept, results, (d_results[0], d_results[1]))
    exact = replace(call, **{name: getattr(call, name).double() for name in "qkv"})
    d_exact = (d_results[0].double(), d_results[1])
    for ours, theirs in zip(found, REFERENCE.backward(exact, kept, results, d_exact), strict=True):
        assert relative_error(ours, theirs) < bound
    return found


def kept_by(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, softcap: float | None = None
) -> tuple[Call, Tensor, tuple[Tensor, Tensor]]:
    """A call over a selection, its bits and its results."""
    size = selection.block_size
    call = Call(q, k, v, Stem(block_size=size, stride=1), q.shape[3] ** -0.5, k.shape[1], return_lse=True, softcap=softcap)
    out, lse, kept = TritonBackend().attend_kept(call, selection)
    assert torch.equal(kept, eager_pack(selection))
    return call, kept, (out, lse)


@pytest.mark.parametrize(
    ("shape", "block", "dtype"),
    [
        ((2, 40, 75, 4, 2, 32), 16, torch.float32),
        ((1, 45, 160, 3, 1, 24), 32, torch.float16),
        ((1, 1, 70, 2, 2, 16), 16, torch.float32),
        ((1, 100, 140, 2, 1, 80), 64, torch.float32),
    ],
    ids=["chunk", "group-of-3-fp16", "one-query", "block-64"],
)
def test_gradients_are_those_of_the_references_autograd(shape, block, dtype):
    q, k, v = make_qkv(*shape, dtype=dtype)
    selection = random_selection(shape[0], shape[3], shape[1], shape[2], block, 0.4)
    gradients_agree(*kept_by(q, k, v, selection), bound=1e-3 if dtype == torch.float16 else 2e-6)


@pytest.mark.parametrize(("softcap", "value_dim"), [(0.5, 32), (None, 16), (3.0, 48)])
def test_gradients_under_a_soft_cap_and_with_values_of_another_dimension(softcap, value_dim):
    q, k, v = make_qkv(2, 40, 75, 4, 2, 32, value_dim=value_dim)
    found = gradients_agree(*kept_by(q, k, v, random_selection(2, 4, 40, 75, 16, 0.4), softcap), bound=1e-5)
    assert found[2].shape == v.shape


def test_gradients_where_the_first_block_is_cut_into_chunks_and_heads_run_apart(monkeypatch):
    """Every row of 3 heads keeps the first block: 39 entries, of which a chunk has 16 at most."""
    q, k, v = make_qkv(1, 200, 200, 6, 2, 16)
    mask = random_selection(1, 6, 200, 200, 16, 0.02).to_mask()
    mask[..., 0] = True
    call, kept, results = kept_by(q, k, v, BlockSelection.from_mask(mask, block_size=16, q_len=200, kv_len=200))
    columns = list_columns(kept, 3, 13, 6 * 91, 1024, Launches())
    assert columns.chunks.view(2, 13)[:, 0].tolist() == [3, 3]
    split = columns.slots >= 0
    assert torch.equal(split, columns.chunks > 1)
    assert int(columns.slots[split][-1] + columns.chunks[split][-1]) <= columns.room
    together = gradients_agree(call, kept, results)
    monkeypatch.setattr(backward, "LIST_BYTES", 1)
    assert all(map(torch.equal, gradients_agree(call, kept, results), together))


def test_lists_both_ways_hold_the_selection_in_order():
    selection = random_selection(2, 4, 600, 1300, 16, 0.3)  # more than 64 rows and 32 key blocks: several tiles each
    kept, mask = eager_pack(selection), selection.to_mask()
    (_, heads, rows, blocks), most, launches = mask.shape, int(mask.sum()), Launches()
    lists, starts = list_rows(kept, blocks, most, launches)
    assert torch.equal(lists, mask.nonzero()[:, 3].int())
    assert torch.equal(starts[1:] - starts[:-1], selection.counts.flatten())
    columns = list_columns(kept, 2, blocks, most, 7, launches)
    by_column = mask.unflatten(1, (heads // 2, 2)).permute(0, 1, 4, 2, 3)  # sequence, kv head, key block, query head, row
    entries = by_column.nonzero()
    assert torch.equal(columns.lists, (entries[:, 3] * rows + entries[:, 4]).int())
    assert torch.equal(columns.starts[1:] - columns.starts[:-1], by_column.sum(-1).flatten().int())
    assert int(columns.longest) == -(-most // 7)
    owners = columns.owners[columns.owners < len(columns.chunks)]
    assert torch.equal(owners, torch.arange(len(columns.chunks)).repeat_interleave(columns.chunks).int())
    assert torch.equal(columns.firsts, columns.chunks.cumsum(0).int() - columns.chunks)


def test_gradients_of_a_packed_batch_are_those_of_each_sequence():
    single = some()
    q, k, v, batch = packed(single)
    policy = replace(SMALL, tail_blocks=2)  # two rows without a list
    call = Call(q, k, v, policy, q.shape[-1] ** -0.5, batch=batch, dense_below=70, return_lse=True)
    out, lse, kept = TritonBackend().forward_kept(call)
    found = gradients_agree(call, kept, (out, lse))
    draw = torch.Generator().manual_seed(1)
    d_out, d_lse = (torch.randn(x.shape, generator=draw) for x in (out, lse))
    for i, (low, high) in enumerate(pairwise(batch.q_starts)):
        k_low, k_high = batch.k_starts[i : i + 2]
        if low == high:
            assert not found[1][k_low:k_high].any()
            assert not found[2][k_low:k_high].any()
            continue
        part = replace(call.only(i), dense_below=70)
        *results, bits = TritonBackend().forward_kept(part)
        assert torch.equal(kept[i, :, : bits.shape[2], : bits.shape[3]], bits[0])
        assert not kept[i, :, bits.shape[2] :].any()
        alone = TritonBackend().backward(part, bits, tuple(results), (d_out[None, low:high], d_lse[None, :, low:high]))
        assert torch.equal(found[0][low:high], alone[0][0])
        for ours, theirs in zip(found[1:], alone[1:], strict=True):
            torch.testing.assert_close(ours[k_low:k_high], theirs[0], atol=1e-5, rtol=1e-5)


def test_a_call_that_is_cut_keeps_the_bits_of_one_that_is_not(monkeypatch):
    q, k, v = peaked(1, 70, 110, 2, 1, 16)
    call = Call(q, k, v, BY_MASS, 0.25, 110, dense_below=0)
    whole = TritonBackend().forward_kept(call)
    monkeypatch.setattr(pieces, "LIST_BYTES", 4 * 2 * 7 * 2)
    assert len(pieces.pieces(call)) > 1
    assert all(map(torch.equal, TritonBackend().forward_kept(call), whole))
