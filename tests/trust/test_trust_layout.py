"""Views are read as they are: any strides, offsets and sharing, with no copy and nothing written back."""

import pytest
import torch
from tests.fuzz.poison import surrounded
from tests.rigs import INTERPRETED, Rig, equal

import stem_attention as sa
from stem_attention.backends import Request, get_backend
from stem_attention.call import Call
from stem_attention.testing import LAYOUTS, pack, relative_error


def everything(rig, q, k, v, selection):
    return *rig.attend(q, k, v, selection), *rig.whole(q, k, v)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_every_layout_gives_the_same_bits(layout, rig):
    plain, laid_out = (rig.qkv(3.3, 4.7, batch=2, layout=name) for name in ("bshd", layout))
    selection = rig.lists(*plain[:2])
    got, expected = (everything(rig, *x, selection) for x in (laid_out, plain))
    if rig.backend == "torch":  # whose dense rows are torch's, of which each layout has its own
        assert all(torch.allclose(x, y, rtol=1e-5, atol=1e-5) for x, y in zip(got, expected, strict=True))
    else:
        assert equal(got, expected)


@pytest.mark.parametrize("what", ["heads of the keys", "batch", "queries"])
def test_expanded_tensors_are_read_through_strides_of_zero(what, rig):
    q, k, v = rig.qkv(3.3, 3.3, batch=2, heads=(2, 2))
    if what == "heads of the keys":
        k, v = (x[:, :, :1].expand(-1, -1, 2, -1) for x in (k, v))
    elif what == "batch":
        k, v = (x[:1].expand(2, -1, -1, -1) for x in (k, v))
    else:
        q = q[:, :1, :1].expand(-1, q.shape[1], 2, -1)
    copies = [x.contiguous() for x in (q, k, v)]
    selection = rig.lists(*copies[:2])
    got, expected = everything(rig, q, k, v, selection), everything(rig, *copies, selection)
    # On Hopper the portable kernel reads the views, and rounds in another order.
    assert all(relative_error(x, y) < 2 * torch.finfo(rig.dtype).eps for x, y in zip(got, expected, strict=True))
    assert torch.equal(rig.select(q, k, v).to_mask(), rig.select(*copies).to_mask())


def test_keys_may_be_the_values_and_the_queries(rig):
    x, _, _ = rig.qkv(3.3, 3.3, heads=(2, 2))
    before = x.clone()
    got, expected = rig.whole(x, x, x), rig.whole(x.clone(), x.clone(), x.clone())
    assert equal(got, expected)
    assert torch.equal(x, before)


def test_inputs_are_never_written(rig):
    q, k, v = (surrounded(x) for x in rig.qkv(3.3, 4.7))
    selection = rig.lists(q, k)
    held = [x._base if x._base is not None else x for x in (q, k, v)] + [selection.indices, selection.counts]
    before = [x.clone() for x in held]
    everything(rig, q, k, v, selection)
    assert all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(held, before, strict=True))


@pytest.mark.parametrize("how", ["heads expanded", "batch expanded", "heads sliced", "transposed"])
def test_lists_may_be_views_too(how, rig):
    """Kernels walk lists by the row: once, those of an expanded selection were read beyond their end."""
    q, k, v = rig.qkv(5.3, 5.3, batch=2, heads=(2, 1))
    one = rig.lists(*rig.qkv(5.3, 5.3, batch=2, heads=(4, 1))[:2])
    if how == "heads expanded":
        indices, counts = (x[:, :1].expand(-1, 2, *x.shape[2:]) for x in (one.indices, one.counts))
    elif how == "batch expanded":
        indices, counts = (x[:1, :2].expand(2, *[-1] * (x.dim() - 1)) for x in (one.indices, one.counts))
    elif how == "heads sliced":
        indices, counts = one.indices[:, 1:3], one.counts[:, 1:3]
    else:
        indices, counts = (x[:, :2].mT.contiguous().mT for x in (one.indices, one.counts))
    assert not (indices.is_contiguous() and counts.is_contiguous())
    made = [sa.BlockSelection(a, b, rig.block, q.shape[1], k.shape[1]) for a, b in (
        (indices, counts), (indices.contiguous(), counts.contiguous()),
    )]  # fmt: skip
    assert equal(*(rig.attend(q, k, v, selection) for selection in made))


@pytest.mark.parametrize("how", ["every second column", "rows sliced", "transposed"][: 2 if INTERPRETED else 3])
def test_page_tables_may_be_views_too(how, rig):
    """Kernels walk a row of the table by ones: once, wrong pages were read where its columns lie apart."""
    batch = pack([rig.qkv(x, x, heads=(2, 1), seed=i) for i, x in enumerate((2.2, 1, 1.4))], page_size=rig.block)
    spread = {
        "every second column": lambda t: torch.stack([t, torch.zeros_like(t)], 2).flatten(1)[:, ::2],
        "transposed": lambda t: t.T.contiguous().T,
        "rows sliced": lambda t: torch.cat([t * 0, t])[len(t) :],
    }[how](batch["page_table"])
    assert equal(rig.packed(**{**batch, "page_table": spread}), rig.packed(**batch))


@pytest.mark.skipif(INTERPRETED, reason="tests/gpu/test_gpu_runtime.py measures the kernels' memory on a GPU")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_tensor_larger_than_the_keys_is_made(layout, largest):
    """Of eager torch, whose attention lays keys and values out block by block, once each."""
    q, k, v = Rig("torch", block=64, dim=64).qkv(16, 32, heads=(16, 8), layout=layout)
    call = Call(q, k, v, sa.Stem(block_size=64), 0.125, k.shape[1], return_lse=True)
    backend = get_backend(Request.of(q, v, 64), "torch")
    with largest:
        selection = backend.select(call)
    assert largest.seen <= k.numel() * 0.75
    with largest:
        backend.attend(call, selection)
    assert largest.seen <= k.numel()
