"""Numbers that nobody should read are NaN or infinite here, and nothing of them shows.

Unselected blocks: tests/backends/test_attention.py, tests/gpu/test_gpu_attention.py.
"""

import math

import pytest
import torch
from tests.fuzz.poison import new_memory_is_nan, surrounded
from tests.rigs import INTERPRETED, equal

from stem_attention.backends.dense import dense_attention
from stem_attention.testing import exact_attention, make_qkv, pack, token_mask

POISONS = (math.nan,) if INTERPRETED else (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("by", POISONS)
def test_what_lies_around_the_tensors_is_not_read(by, rig):
    q, k, v = rig.qkv(3.3, 4.7, batch=2)
    selection = rig.lists(q, k)
    clean = *rig.attend(q, k, v, selection), *rig.whole(q, k, v)
    around = [surrounded(x, by) for x in (q, k, v)]
    assert equal((*rig.attend(*around, selection), *rig.whole(*around)), clean)


@pytest.mark.parametrize("changes", [{}, {"policy": {"magnitude": "zscore", "forced": "extra"}}, {"dense_below": 10_000}])
def test_every_number_of_new_memory_is_written_before_it_is_read(changes, rig):
    q, k, v = rig.qkv(3.3, 4.7, batch=2)
    options = {**changes, "policy": rig.stem(**changes["policy"]) if "policy" in changes else rig.policy}
    clean = *rig.whole(q, k, v, **options), rig.whole(q, k, v, return_lse=False, **options)
    with new_memory_is_nan():
        again = *rig.whole(q, k, v, **options), rig.whole(q, k, v, return_lse=False, **options)
    assert equal(again, clean)
    assert all(x.isfinite().all() for x in clean)


@pytest.mark.parametrize("by", POISONS)
@pytest.mark.parametrize("pages", [0, 1] if INTERPRETED else [0, 0.5, 1])
def test_unused_pages_and_a_packed_batchs_surroundings_are_not_read(pages, by, rig):
    page = round(pages * rig.block)
    q_lens, kv_lens = [round(x * rig.block) for x in (2.2, 0, 1, 0.1)], [round(x * rig.block) for x in (4.1, 1, 3.9, 2)]
    parts = [make_qkv(1, *x, 4, 2, rig.dim, rig.dtype, rig.device, i) for i, x in enumerate(zip(q_lens, kv_lens, strict=True))]

    def run(by):
        batch = pack(parts, page, by)
        return rig.packed(**batch if page else {**batch, **{name: surrounded(batch[name], by) for name in "qkv"}})

    clean = run(0.0)
    with new_memory_is_nan():
        assert equal(run(by), clean)
    assert clean[0].isfinite().all()


@pytest.mark.parametrize("by", POISONS)
@pytest.mark.parametrize("which", ["k", "v"])
def test_in_a_selected_block_it_shows_as_in_dense_attention(which, by, rig):
    q, k, v = rig.qkv(4, 4, heads=(2, 1))
    selection = rig.lists(q, k, density=0.6)
    (k if which == "k" else v)[0, round(1.5 * rig.block), 0, 3] = by
    out, _ = rig.attend(q, k, v, selection)
    exact, _ = exact_attention(q, k, v, token_mask(selection))
    seen = token_mask(selection)[:, :, :, round(1.5 * rig.block)].transpose(1, 2)
    assert torch.equal(out.isfinite()[seen], exact.isfinite()[seen])
    kept = selection.to_mask()[..., 1].repeat_interleave(rig.block, 2).transpose(1, 2)
    assert out[~kept].isfinite().all()  # the exact result is not: there a weight of 0 meets every value


@pytest.mark.parametrize("forced", ["inside", "extra"])
def test_in_the_whole_a_poisoned_value_is_never_lost(forced, rig):
    """Its block ranks first, so that every row that may keep it does: nothing turns out finite and wrong."""
    q, k, v = rig.qkv(12, 12, heads=(2, 1))
    at = round(3.5 * rig.block)
    v[0, at, 0, 3] = math.nan
    out, _ = rig.whole(q, k, v, policy=rig.stem(min_blocks=4, decay=1.0, forced=forced))
    dense = dense_attention(q, k, v, q.shape[3] ** -0.5)
    assert torch.equal(out[:, at:, :, 3].isnan(), dense[:, at:, :, 3].isnan())
    assert out[:, : 3 * rig.block].isfinite().all()


def test_a_poisoned_query_spoils_its_own_row_alone(rig):
    q, k, v = rig.qkv(8, 8)
    clean = rig.whole(q, k, v)
    bad = round(4.5 * rig.block)
    q[0, bad, 1] = math.nan
    out, lse = rig.whole(q, k, v)
    assert out[0, bad, 1].isnan().all()
    assert int(out.isnan().any(-1).sum()) == int(lse.isnan().sum()) == 1
    block = slice(4 * rig.block, 5 * rig.block)  # whose other rows may keep other blocks
    others = torch.ones(q.shape[:3], dtype=torch.bool, device=q.device)
    others[0, block, 1] = False
    assert torch.equal(out[others], clean[0][others])
    assert torch.equal(lse.transpose(1, 2)[others], clean[1].transpose(1, 2)[others])
