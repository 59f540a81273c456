"""The same numbers give the same bits: every time, on every stream, and whatever else is in the batch."""

import pytest
import torch
from tests.rigs import INTERPRETED, equal

import stem_attention as sa
from stem_attention.testing import make_qkv, pack


def test_a_hundred_runs(rig):
    q, k, v = rig.qkv(3.3, 4.7, batch=2)
    selection = rig.lists(q, k)
    first = *rig.whole(q, k, v), *rig.attend(q, k, v, selection), rig.select(q, k, v).indices
    for _ in range(1 if INTERPRETED or rig.backend == "reference" else 100):
        assert equal((*rig.whole(q, k, v), *rig.attend(q, k, v, selection), rig.select(q, k, v).indices), first)


@pytest.mark.parametrize("return_lse", [False] if INTERPRETED else [False, True])
def test_a_sequence_of_a_batch_is_as_if_alone(return_lse, rig):
    q, k, v = rig.qkv(2.3, 3.7, batch=3)
    selection = rig.lists(q, k, density=0.5)
    mask = selection.to_mask()
    mask[1] = torch.ones_like(mask[1]).tril(selection.first_row)  # a neighbour that keeps everything
    selection = sa.BlockSelection.from_mask(mask, block_size=rig.block, q_len=q.shape[1], kv_len=k.shape[1])
    together = [rig.whole(q, k, v, return_lse=return_lse), rig.attend(q, k, v, selection, return_lse=return_lse)]
    kept = rig.select(q, k, v)
    for i in range(3):
        one = [x[i : i + 1] for x in (q, k, v)]
        lists = [x[i : i + 1].contiguous() for x in (selection.indices, selection.counts)]
        mine = sa.BlockSelection(*lists, rig.block, q.shape[1], k.shape[1])
        alone = [rig.whole(*one, return_lse=return_lse), rig.attend(*one, mine, return_lse=return_lse)]
        for several, single in zip(together, alone, strict=True):
            pairs = zip(several, single, strict=True) if return_lse else [(several, single)]
            assert all(torch.equal(x[i : i + 1], y) for x, y in pairs)
        assert torch.equal(kept.indices[i], rig.select(*one).indices[0])


def test_neighbours_in_a_packed_batch_change_nothing(rig):
    mine = make_qkv(1, *(round(x * rig.block) for x in (3.3, 4.7)), 2, 1, rig.dim, rig.dtype, rig.device)

    def among(others):
        parts = [make_qkv(1, *x, 2, 1, rig.dim, rig.dtype, rig.device, seed=9) for x in others]
        out, lse = rig.packed(**pack([parts[0], mine, *parts[1:]]))
        at = slice(parts[0][0].shape[1], parts[0][0].shape[1] + mine[0].shape[1])
        return out[at], lse[:, at]

    small, size = among([(1, 1), (0, 0)]), rig.block
    assert equal(among([(2 * size + 3, 6 * size), (5, 3 * size)]), small)
    assert equal(among([(size, size), (0, size), (7, 7)]), small)
