"""The same numbers give the same bits: every time, on every stream, and whatever else is in the batch."""

import pytest
import torch
from tests.rigs import INTERPRETED, equal

import stem_attention as sa


def test_a_hundred_runs(rig):
    q, k, v = rig.qkv(*((70.3, 93.7) if rig.device == "cuda" else (3.3, 4.7)), batch=2)  # on a GPU, many programs
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
