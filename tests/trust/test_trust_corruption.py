"""A corrupted selection: no kernel reads outside the keys or outside the lists, and every backend that can tell refuses it.

What ``validate()`` refuses: tests/test_selection.py.
"""

import pytest
import torch
from tests.fuzz.poison import surrounded
from tests.rigs import INTERPRETED

import stem_attention as sa
from stem_attention.backends.triton import TritonBackend
from stem_attention.call import Call

LOWEST, HIGHEST = -(1 << 31), (1 << 31) - 1


def in_the_middle(x, guard):
    """The same numbers, contiguous, with ``guard`` before and after them in memory."""
    store = torch.full((x.numel() + 2 * 4096,), guard, dtype=x.dtype, device=x.device)
    return store[4096:-4096].view(x.shape).copy_(x)


CORRUPTIONS = {
    "ids beyond the keys": lambda i, c: (torch.full_like(i, 1 << 20), c),
    "the highest ids": lambda i, c: (torch.full_like(i, HIGHEST), c),
    "the lowest ids": lambda i, c: (torch.full_like(i, LOWEST), c),
    "padding inside the count": lambda i, c: (torch.full_like(i, -1), c),
    "counts wider than the list": lambda i, c: (i, c + i.shape[3]),
    "the highest counts": lambda i, c: (i, torch.full_like(c, HIGHEST)),
    "the lowest counts": lambda i, c: (i, torch.full_like(c, LOWEST)),
    "no counts": lambda i, c: (i, torch.zeros_like(c)),
    "descending ids": lambda i, c: (i.flip(-1), c),
    "one id again and again": lambda i, c: (i[..., :1].expand_as(i).contiguous(), torch.full_like(c, i.shape[3])),
    "rows without their diagonal": lambda i, c: (i, c - 1),
    "lists of no width": lambda i, c: (i[..., :0].contiguous(), c),
    "ids of the row below": lambda i, c: (i.roll(-1, 2), c.roll(-1, 2)),
}


def corrupted(rig, what, guard, density=0.5):
    q, k, v = rig.qkv(4.3, 5.6, heads=(2, 1))
    good = rig.lists(q, k, density=density)
    indices, counts = (in_the_middle(x, guard) for x in CORRUPTIONS[what](good.indices, good.counts))
    return [surrounded(x) for x in (q, k, v)], sa.BlockSelection(indices, counts, rig.block, q.shape[1], k.shape[1])


@pytest.mark.parametrize("what", CORRUPTIONS)
def test_no_kernel_reads_outside(what, rig):
    """Around the tensors lies NaN: it would show. Around the lists lie other ids: what they name would show too."""
    if rig.backend in ("torch", "reference"):
        (q, k, v), selection = corrupted(rig, what, 0)
        with pytest.raises(ValueError, match="^selection: expected"):
            rig.attend(q, k, v, selection)
        return
    results = []
    for guard in (0, 1, HIGHEST):
        (q, k, v), selection = corrupted(rig, what, guard)
        results.append(unvalidated(rig, q, k, v, selection))
    for out, lse in results:
        assert not finite_and_wrong(out, v)
        assert torch.equal(out.nan_to_num(7.0), results[0][0].nan_to_num(7.0))
        assert torch.equal(lse.nan_to_num(7.0), results[0][1].nan_to_num(7.0))


def unvalidated(rig, q, k, v, selection):
    """As the kernels get it on a GPU, where validating would make the host wait."""
    if not INTERPRETED:
        return rig.attend(q, k, v, selection)
    call = Call(q, k, v, rig.policy, q.shape[3] ** -0.5, k.shape[1], return_lse=True)
    return TritonBackend().attend(call, selection)


def finite_and_wrong(out, v):
    """A mean of values lies between the least and the greatest; rows that keep nothing are NaN in every number."""
    rows = out.float()
    partly = rows.isnan().any(-1) != rows.isnan().all(-1)
    beyond = rows.nan_to_num(0).abs() > v.float().abs().amax() * 1.01
    return bool(partly.any() | beyond.any())
