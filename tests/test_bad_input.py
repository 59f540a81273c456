"""Wrong arguments: each a ValueError that names the argument, what was expected, what came and the way out."""

import math
import re

import pytest
import torch

import stem_attention as sa
from stem_attention.testing import make_qkv

CONFIG = sa.StemConfig(block_size=16, dense_below=0)


def stem(q, k, v, **options):
    return sa.stem_attention(q, k, v, **{"config": CONFIG, **options})


def stem_with_lse(q, k, v, **options):
    return sa.stem_attention(q, k, v, **{"config": CONFIG, "return_lse": True, **options})


def dense(q, k, v, **options):
    return sa.stem_attention(q, k, v, **options)


def select(q, k, v, **options):
    return sa.select_blocks(q, k, v, **{"config": CONFIG, **options})


def attend(q, k, v, **options):
    options.pop("config", None)
    selection = sa.select_blocks(*make_qkv(2, 40, 50, 4, 2, 16), config=CONFIG)
    return sa.block_sparse_attention(q, k, v, selection, **options)


ENTRIES = (stem, stem_with_lse, dense, select, attend)

BAD_TENSORS = {
    "q_is_a_list": ("q", lambda q, k, v: ([1.0], k, v), "pass a torch.Tensor"),
    "k_is_none": ("k", lambda q, k, v: (q, None, v), "pass a torch.Tensor"),
    "v_is_an_array": ("v", lambda q, k, v: (q, k, v.numpy()), "pass a torch.Tensor"),
    "q_rank_3": ("q", lambda q, k, v: (q[0], k, v), "reshape"),
    "k_rank_5": ("k", lambda q, k, v: (q, k[None], v), "reshape"),
    "v_rank_0": ("v", lambda q, k, v: (q, k, v.sum()), "reshape"),
    "int_tensors": ("q", lambda q, k, v: (q.int(), k.int(), v.int()), ".to()"),
    "bool_tensors": ("q", lambda q, k, v: (q > 0, k > 0, v > 0), ".to()"),
    "complex_tensors": ("q", lambda q, k, v: (q + 0j, k + 0j, v + 0j), ".to()"),
    "fp8_tensors": ("q", lambda *x: tuple(t.to(torch.float8_e4m3fn) for t in x), ".to()"),
    "k_other_dtype": ("k", lambda q, k, v: (q, k.half(), v.half()), ".to()"),
    "v_other_dtype": ("v", lambda q, k, v: (q, k, v.bfloat16()), ".to()"),
    "k_other_device": ("k", lambda q, k, v: (q, k.to("meta"), v), ".to()"),
    "v_other_device": ("v", lambda q, k, v: (q, k, v.to("meta")), ".to()"),
    "q_other_device": ("k", lambda q, k, v: (q.to("meta"), k, v), ".to()"),
    "q_last_dim_strided": ("q", lambda q, k, v: (q.mT.contiguous().mT, k, v), ".contiguous()"),
    "k_last_dim_strided": ("k", lambda q, k, v: (q, k.repeat(1, 1, 1, 2)[..., ::2], v), ".contiguous()"),
    "v_last_dim_expanded": ("v", lambda q, k, v: (q, k, v[..., :1].expand(-1, -1, -1, 16)), ".contiguous()"),
    "k_head_dim": ("k", lambda q, k, v: (q, k[..., :8], v[..., :8]), "last dimensions"),
    "v_head_dim": ("v", lambda q, k, v: (q, k, v[..., :8]), "last dimensions"),
    "head_dim_0": ("q", lambda q, k, v: (q[..., :0], k[..., :0], v[..., :0]), "last dimensions"),
    "v_length": ("v", lambda q, k, v: (q, k, v[:, 1:]), "one value for every key"),
    "v_heads": ("v", lambda q, k, v: (q, k, v[:, :, :1]), "one value for every key"),
    "heads_do_not_divide": ("k", lambda q, k, v: (q[:, :, :3], k, v), "q_heads // kv_heads"),
    "more_kv_heads": ("k", lambda q, k, v: (q[:, :, :1], k, v), "q_heads // kv_heads"),
    "no_kv_heads": ("k", lambda q, k, v: (q, k[:, :, :0], v[:, :, :0]), "q_heads // kv_heads"),
    "no_q_heads": ("k", lambda q, k, v: (q[:, :, :0], k, v), "q_heads // kv_heads"),
    "empty_batch": ("q", lambda q, k, v: (q[:0], k[:0], v[:0]), "skip the call"),
    "other_batch": ("q", lambda q, k, v: (q[:1], k, v), "batch"),
    "k_shorter_than_q": ("k", lambda q, k, v: (q, k[:, :39], v[:, :39]), "cached keys"),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors(case, entry):
    name, spoil, way_out = BAD_TENSORS[case]
    with pytest.raises(ValueError, match=f"^{name}: expected .+, got .+; .*{re.escape(way_out)}"):
        entry(*spoil(*make_qkv(2, 40, 50, 4, 2, 16)))


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, 10**400, "0.1", True, torch.tensor(0.1), 1j])
def test_bad_scale(scale, entry):
    with pytest.raises(ValueError, match=r"^scale: expected a finite number or None, got .+; leave it out"):
        entry(*make_qkv(2, 40, 50, 4, 2, 16), scale=scale)


@pytest.mark.parametrize("entry", [stem, stem_with_lse, dense, select])
@pytest.mark.parametrize("prompt_len", [49, 0, -1, 50.0, "50", True, math.nan])
def test_bad_prompt_len(prompt_len, entry):
    with pytest.raises(ValueError, match=r"^prompt_len: expected an integer >= the 50 keys given, got .+; it counts"):
        entry(*make_qkv(2, 40, 50, 4, 2, 16), prompt_len=prompt_len)


@pytest.mark.parametrize("entry", [stem, stem_with_lse, dense, select])
@pytest.mark.parametrize("config", [{"beta": 0.2}, "paper", 3, sa.StemConfig])
def test_bad_config(config, entry):
    with pytest.raises(ValueError, match=r"^config: expected a StemConfig or None, got .+; build one"):
        entry(*make_qkv(2, 40, 50, 4, 2, 16), config=config)


BAD_FACTORS = {
    "two_layers": ([[1.0] * 4] * 2, "2 x 4"),
    "too_few_heads": ([[1.0] * 3], "1 x 3"),
    "as_many_as_kv_heads": ([[1.0] * 2], "1 x 2"),
    "too_many_heads": ([[1.0] * 5], "1 x 5"),
}


@pytest.mark.parametrize("dense_below", [0, 51])
@pytest.mark.parametrize("entry", [stem, stem_with_lse, select])
@pytest.mark.parametrize("case", BAD_FACTORS)
def test_head_factors_of_other_layers_or_heads(case, entry, dense_below):
    factors, got = BAD_FACTORS[case]
    config = sa.StemConfig.mass(block_size=16, key_pool=16, dense_below=dense_below, head_factors=factors)
    expected = "config: expected head_factors of one layer and the 4 query heads of q"
    with pytest.raises(ValueError, match="expected") as refused:
        entry(*make_qkv(2, 40, 50, 4, 2, 16), config=config)
    assert str(refused.value) == f"{expected}, got {got} of them; pass config.for_layer(layer)"


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("backend", ["flash", "", "AUTO", None, 3, ["torch"]])
def test_bad_backend(backend, entry):
    with pytest.raises(ValueError, match=r'^backend: expected .+, got .+; use "auto"'):
        entry(*make_qkv(2, 40, 50, 4, 2, 16), backend=backend)


OTHER_SHAPES = {
    "batch": make_qkv(1, 40, 50, 4, 2, 16),
    "q_heads": make_qkv(2, 40, 50, 2, 2, 16),
    "q_len": make_qkv(2, 41, 50, 4, 2, 16),
    "kv_len": make_qkv(2, 40, 51, 4, 2, 16),
}


@pytest.mark.parametrize("what", OTHER_SHAPES)
def test_a_selection_for_other_shapes(what):
    with pytest.raises(ValueError, match=r"^selection: expected .*\(batch, q_heads, q_len, kv_len\) = .+, got .+; select for"):
        attend(*OTHER_SHAPES[what])


@pytest.mark.parametrize("selection", [None, "dense", torch.zeros(2, 4, 4, 4)])
def test_a_selection_of_another_type(selection):
    with pytest.raises(ValueError, match=r"^selection: expected a BlockSelection, got .+; make one"):
        sa.block_sparse_attention(*make_qkv(2, 40, 50, 4, 2, 16), selection)


def test_a_selection_on_another_device():
    q, k, v = make_qkv(2, 40, 50, 4, 2, 16)
    made = sa.select_blocks(q, k, v, config=CONFIG)
    for indices, counts in ((made.indices.to("meta"), made.counts), (made.indices, made.counts.to("meta"))):
        elsewhere = sa.BlockSelection(indices, counts, 16, 40, 50)
        with pytest.raises(ValueError, match=r"^selection: expected the device of q, cpu, got meta; move it"):
            sa.block_sparse_attention(q, k, v, elsewhere)


def write(row, ids=None, count=None):
    """Overwrite the ids or the count of one (batch, head, row)."""

    def spoil(selection):
        if ids is not None:
            selection.indices[row] = torch.tensor(ids, dtype=torch.int32)
        if count is not None:
            selection.counts[row] = count

    return spoil


CORRUPTIONS = {
    "an id beyond the diagonal": (write((0, 0, 0), ids=[3, -1, -1, -1]), "between 0 and the row's diagonal"),
    "a negative id": (write((0, 1, 2), ids=[-2, 1, 2, -1]), "between 0 and the row's diagonal"),
    "descending ids": (write((1, 3, 3), ids=[1, 0, 2, 3]), "ascending"),
    "an id twice": (write((1, 3, 3), ids=[0, 0, 2, 3]), "ascending"),
    "a row without its diagonal": (write((0, 0, 3), ids=[0, 1, 2, -1], count=3), "hold its diagonal block"),
    "a count of nothing": (write((0, 0, 0), count=0), "counts between 1 and width=4"),
    "a count wider than the list": (write((1, 2, 3), count=5), "counts between 1 and width=4"),
    "an id after the count": (write((1, 2, 3), ids=[3, 0, -1, -1], count=1), "padding of -1"),
}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("what", CORRUPTIONS)
def test_a_corrupted_selection(what, backend):
    spoil, expected = CORRUPTIONS[what]
    q, k, v = make_qkv(2, 40, 50, 4, 2, 16)  # 50 keys are 4 blocks, and the first query, at 10, lies in the first
    mask = torch.ones(2, 4, 4, 4, dtype=torch.bool).tril()
    selection = sa.BlockSelection.from_mask(mask, block_size=16, q_len=40, kv_len=50)
    spoil(selection)
    with pytest.raises(ValueError, match=f"^selection: expected .*{expected}.*, got .+; build it with from_mask or from_lists"):
        sa.block_sparse_attention(q, k, v, selection, backend=backend)


@pytest.mark.parametrize("entry", ENTRIES[:3])
def test_good_input_of_the_table_passes(entry):
    assert entry(*make_qkv(2, 40, 50, 4, 2, 16)) is not None
