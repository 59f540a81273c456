"""Ragged batches and paged caches: the same numbers as one call for each sequence."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stem_attention as sa
from stem_attention.testing import make_qkv, structured_qkv
from stem_attention.testing.packed import borders, to_pages

SPARSE = sa.StemConfig(block_size=16, min_blocks=3, sink_blocks=1, local_blocks=1, tail_blocks=1, dense_below=64)
FACTORS = sa.StemConfig.mass(
    block_size=16, query_pool=4, key_pool=8, tail_blocks=1, dense_below=64, share=2.0, head_factors=[[0.2, 1.0, 2.0, 6.0]]
)


def ragged(q_lens, kv_lens, dtype=torch.float32, heads=(4, 2), dim=16):
    """Packed q, k, v and the arguments that say where the sequences lie."""
    parts = [
        structured_qkv(1, q_len, kv_len, *heads, dim, dtype=dtype, seed=i)
        for i, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True))
    ]
    packed = tuple(torch.cat([part[i][0] for part in parts]) for i in range(3))
    return packed, (borders(q_lens), borders(kv_lens), max(q_lens), max(kv_lens))


def one_by_one(packed, lengths, **options):
    prompt_lens = options.pop("prompt_lens", None)
    q, k, v = packed
    outs, norms = [], []
    for i in range(len(lengths[0]) - 1):
        rows, keys = (slice(int(x[i]), int(x[i + 1])) for x in lengths[:2])
        out, lse = sa.stem_attention(
            q[None, rows], k[None, keys], v[None, keys], return_lse=True,
            prompt_len=None if prompt_lens is None else prompt_lens[i], **options,
        )  # fmt: skip
        outs.append(out[0])
        norms.append(lse[0])
    return torch.cat(outs), torch.cat(norms, 1)


CASES = {
    "one": ([50], [80]),
    "many": ([70, 1, 33, 100], [70, 90, 40, 300]),
    "empty ones": ([0, 65, 0, 0], [0, 65, 30, 0]),
    "nothing at all": ([0, 0], [0, 20]),
}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("config", [SPARSE, FACTORS], ids=["budget", "factors"])
def test_ragged_batches_equal_single_calls_exactly(config, case, dtype, backend):
    packed, lengths = ragged(*CASES[case], dtype=dtype)
    out, lse = sa.stem_attention_varlen(*packed, *lengths, config=config, return_lse=True, backend=backend)
    expected, expected_lse = one_by_one(packed, lengths, config=config, backend=backend)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    assert out.dtype == dtype
    assert out.shape == packed[0].shape
    assert lse.dtype == torch.float32
    assert lse.shape == (4, len(packed[0]))


def test_without_lse_it_equals_single_calls_without_lse_exactly():
    packed, lengths = ragged(*CASES["many"])
    out = sa.stem_attention_varlen(*packed, *lengths, config=SPARSE)
    for i in range(4):
        rows, keys = (slice(int(x[i]), int(x[i + 1])) for x in lengths[:2])
        alone = sa.stem_attention(packed[0][None, rows], packed[1][None, keys], packed[2][None, keys], config=SPARSE)
        assert torch.equal(out[rows], alone[0])


def test_a_row_never_depends_on_its_neighbours():
    packed, lengths = ragged(*CASES["many"])
    out = sa.stem_attention_varlen(*packed, *lengths, config=SPARSE)
    bad = tuple(x.clone() for x in packed)
    for x, starts in zip(bad, (lengths[0], lengths[1], lengths[1]), strict=True):
        x[starts[1] : starts[2]] = math.nan
    again = sa.stem_attention_varlen(*bad, *lengths, config=SPARSE)
    low, high = lengths[0][1], lengths[0][2]
    assert again[low:high].isnan().all()
    assert torch.equal(again[:low], out[:low])
    assert torch.equal(again[high:], out[high:])


def test_prompt_lens_keep_the_budgets_of_the_whole_prompt():
    packed, lengths = ragged([64, 96], [64, 128])
    for prompt_lens in ([300, 1000], (64, 128)):
        out = sa.stem_attention_varlen(*packed, *lengths, config=SPARSE, prompt_lens=prompt_lens, return_lse=True)
        expected = one_by_one(packed, lengths, config=SPARSE, prompt_lens=prompt_lens)
        assert all(torch.equal(x, y) for x, y in zip(out, expected, strict=True))
    assert not torch.equal(out[0], sa.stem_attention_varlen(*packed, *lengths, config=SPARSE, prompt_lens=[300, 1000]))


def test_scale_reaches_every_sequence():
    packed, lengths = ragged(*CASES["many"])
    out = sa.stem_attention_varlen(*packed, *lengths, config=SPARSE, scale=0.5, return_lse=True)
    expected = one_by_one(packed, lengths, config=SPARSE, scale=0.5)
    assert all(torch.equal(x, y) for x, y in zip(out, expected, strict=True))


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("config", [SPARSE, FACTORS], ids=["budget", "factors"])
def test_paged_keys_equal_packed_keys_bit_for_bit(config, case, page_size):
    (q, k, v), lengths = ragged(*CASES[case])
    keys, table = to_pages(k, CASES[case][1], page_size)
    values, same_table = to_pages(v, CASES[case][1], page_size)
    assert torch.equal(table, same_table)
    paged = sa.stem_attention_varlen(q, keys, values, *lengths, page_table=table, config=config, return_lse=True)
    packed = sa.stem_attention_varlen(q, k, v, *lengths, config=config, return_lse=True)
    assert all(torch.equal(x, y) for x, y in zip(paged, packed, strict=True))
    assert not paged[0].isnan().any()


def test_sequences_may_share_pages():
    (q, k, v), _ = ragged([30], [48])
    cache_k, cache_v = (x.view(3, 16, 2, 16) for x in (k, v))
    table = torch.tensor([[0, 1, 2], [0, 1, 2]], dtype=torch.int32)
    lengths = borders([30, 30]), borders([48, 48]), 30, 48
    out = sa.stem_attention_varlen(torch.cat([q, q]), cache_k, cache_v, *lengths, page_table=table, config=SPARSE)
    assert torch.equal(out[:30], out[30:])
    assert torch.equal(out[:30], sa.stem_attention(q[None], k[None], v[None], config=SPARSE)[0])


def test_strided_heads_and_caches_are_accepted():
    (q, k, v), lengths = ragged(*CASES["many"])
    expected = sa.stem_attention_varlen(q, k, v, *lengths, config=SPARSE)
    strided = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    assert torch.allclose(sa.stem_attention_varlen(*strided, *lengths, config=SPARSE), expected, rtol=1e-5, atol=1e-5)
    keys, table = to_pages(k, CASES["many"][1], 16)
    values, _ = to_pages(v, CASES["many"][1], 16)
    fused = torch.cat([keys, values], -1).transpose(1, 2).contiguous().transpose(1, 2)  # vLLM's cache
    out = sa.stem_attention_varlen(q, fused[..., :16], fused[..., 16:], *lengths, page_table=table, config=SPARSE)
    assert torch.equal(out, expected)


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), min_size=1, max_size=4), st.integers(1, 40))
def test_any_lengths_and_page_sizes(sizes, page_size):
    q_lens, kv_lens = [q for q, _ in sizes], [q + cached for q, cached in sizes]
    (q, k, v), lengths = ragged(q_lens, kv_lens)
    keys, table = to_pages(k, kv_lens, page_size)
    values, _ = to_pages(v, kv_lens, page_size)
    paged = sa.stem_attention_varlen(q, keys, values, *lengths, page_table=table, config=SPARSE, return_lse=True)
    expected = one_by_one((q, k, v), lengths, config=SPARSE)
    assert all(torch.equal(x, y) for x, y in zip(paged, expected, strict=True))


def call(**changes):
    """A good call of two sequences (30 of 40 and 20 of 20 tokens), with some arguments replaced."""
    packed, lengths = ragged([30, 20], [40, 20])
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    arguments = {**dict(zip(names, (*packed, *lengths), strict=True)), "config": SPARSE}
    return sa.stem_attention_varlen(**{**arguments, **changes})


Q, K, V = make_qkv(1, 50, 60, 4, 2, 16)[0][0], *(x[0] for x in make_qkv(1, 50, 60, 4, 2, 16)[1:])
INT = torch.int32

BAD_ARGUMENTS = {
    "q_of_rank_4": ("q", {"q": Q[None]}),
    "k_of_rank_4": ("k", {"k": K[None]}),
    "v_is_a_list": ("v", {"v": [1.0]}),
    "v_of_other_length": ("v", {"v": V[1:]}),
    "other_dtype": ("k", {"k": K.half(), "v": V.half()}),
    "strided_last_dim": ("q", {"q": Q.mT.contiguous().mT}),
    "heads": ("k", {"q": Q[:, :3]}),
    "cu_q_int64": ("cu_seqlens_q", {"cu_seqlens_q": torch.tensor([0, 30, 50])}),
    "cu_q_list": ("cu_seqlens_q", {"cu_seqlens_q": [0, 30, 50]}),
    "cu_q_of_rank_2": ("cu_seqlens_q", {"cu_seqlens_q": torch.tensor([[0, 30, 50]], dtype=INT)}),
    "cu_q_without_sequences": ("cu_seqlens_q", {"cu_seqlens_q": torch.tensor([0], dtype=INT)}),
    "cu_q_starts_late": ("cu_seqlens_q", {"cu_seqlens_q": torch.tensor([1, 30, 50], dtype=INT)}),
    "cu_q_falls": ("cu_seqlens_q", {"cu_seqlens_q": torch.tensor([0, 51, 50], dtype=INT)}),
    "cu_q_ends_early": ("cu_seqlens_q", {"cu_seqlens_q": torch.tensor([0, 30, 49], dtype=INT)}),
    "cu_q_ends_late": ("cu_seqlens_q", {"cu_seqlens_q": torch.tensor([0, 30, 51], dtype=INT)}),
    "cu_q_elsewhere": ("cu_seqlens_q", {"cu_seqlens_q": torch.tensor([0, 30, 50], dtype=INT, device="meta")}),
    "cu_k_int64": ("cu_seqlens_k", {"cu_seqlens_k": torch.tensor([0, 40, 60])}),
    "cu_k_ends_early": ("cu_seqlens_k", {"cu_seqlens_k": torch.tensor([0, 40, 59], dtype=INT)}),
    "cu_k_of_three": ("cu_seqlens_k", {"cu_seqlens_k": torch.tensor([0, 40, 50, 60], dtype=INT)}),
    "cu_k_shorter_than_q": ("cu_seqlens_k", {"cu_seqlens_k": torch.tensor([0, 29, 60], dtype=INT), "max_seqlen_k": 60}),
    "max_q_too_small": ("max_seqlen_q", {"max_seqlen_q": 29}),
    "max_k_too_small": ("max_seqlen_k", {"max_seqlen_k": 39}),
    "max_q_float": ("max_seqlen_q", {"max_seqlen_q": 30.0}),
    "max_k_none": ("max_seqlen_k", {"max_seqlen_k": None}),
    "prompt_lens_too_few": ("prompt_lens", {"prompt_lens": [40]}),
    "prompt_lens_int": ("prompt_lens", {"prompt_lens": 40}),
    "prompt_lens_tensor": ("prompt_lens", {"prompt_lens": torch.tensor([40, 20])}),
    "prompt_lens_text": ("prompt_lens", {"prompt_lens": "40"}),
    "prompt_lens_float": ("prompt_lens", {"prompt_lens": [40.5, 20]}),
    "prompt_lens_too_short": ("prompt_lens", {"prompt_lens": [40, 19]}),
    "config": ("config", {"config": "paper"}),
    "factors_of_two_layers": ("config", {"config": sa.StemConfig.mass(head_factors=[[1.0] * 4] * 2)}),  # dense at this length
    "factors_of_two_heads": ("config", {"config": sa.StemConfig.mass(head_factors=[[1.0] * 2], dense_below=0)}),
    "scale": ("scale", {"scale": math.nan}),
    "backend": ("backend", {"backend": "flash"}),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_named(case):
    name, changes = BAD_ARGUMENTS[case]
    with pytest.raises(ValueError, match=f"^{name}: expected .+, got .+; .+"):
        call(**changes)


def paged(**changes):
    """The good call on a cache of 5 pages of 16 tokens."""
    table = torch.tensor([[3, 0, 4], [1, 2, -1]], dtype=INT)
    cache = torch.ones(5, 16, 2, 16)
    return call(**{"k": cache, "v": cache, "page_table": table, **changes})


BAD_PAGES = {
    "table_list": ("page_table", {"page_table": [[0, 1, 2], [3, 4, 0]]}, "list"),
    "table_int64": ("page_table", {"page_table": torch.zeros(2, 3, dtype=torch.int64)}, "int64"),
    "table_of_rank_1": ("page_table", {"page_table": torch.zeros(3, dtype=INT)}, "(3,)"),
    "table_elsewhere": ("page_table", {"page_table": torch.zeros(2, 3, dtype=INT, device="meta")}, "meta"),
    "table_of_one_sequence": ("page_table", {"page_table": torch.zeros(1, 3, dtype=INT)}, "2 rows"),
    "table_of_three_sequences": ("page_table", {"page_table": torch.zeros(3, 3, dtype=INT)}, "2 rows"),
    "table_too_narrow": ("page_table", {"page_table": torch.zeros(2, 2, dtype=INT)}, "3 pages for sequence 0"),
    "page_too_large": ("page_table", {"page_table": torch.tensor([[3, 0, 4], [1, 5, 0]], dtype=INT)}, "sequence 1"),
    "page_negative": ("page_table", {"page_table": torch.tensor([[3, -1, 4], [1, 2, 0]], dtype=INT)}, "sequence 0"),
    "packed_keys": ("k", {"k": torch.ones(60, 2, 16)}, "paged cache"),
    "packed_values": ("v", {"v": torch.ones(60, 2, 16)}, "paged cache"),
    "cache_is_none": ("k", {"k": None}, "paged cache"),
    "pages_of_no_tokens": ("k", {"k": torch.ones(5, 0, 2, 16), "v": torch.ones(5, 0, 2, 16)}, "page_size"),
    "values_of_other_page_size": ("v", {"v": torch.ones(5, 8, 2, 16)}, "shape of k"),
    "values_of_other_page_count": ("v", {"v": torch.ones(4, 16, 2, 16)}, "shape of k"),
    "strided_last_dim": ("k", {"k": torch.ones(5, 16, 16, 2).mT}, "contiguous last dimension"),
    "other_dtype": ("k", {"k": torch.ones(5, 16, 2, 16).half()}, "dtype of q"),
    "head_dim": ("k", {"k": torch.ones(5, 16, 2, 8), "v": torch.ones(5, 16, 2, 8)}, "head dimension"),
}


@pytest.mark.parametrize("case", BAD_PAGES)
def test_bad_pages_are_named(case):
    name, changes, detail = BAD_PAGES[case]
    with pytest.raises(ValueError, match=f"^{name}: expected (?=.*{re.escape(detail)}).+, got .+; .+"):
        paged(**changes)


def test_messages_name_the_sequence():
    with pytest.raises(ValueError, match="20 positions of q in sequence 1, got 10"):
        call(cu_seqlens_k=torch.tensor([0, 50, 60], dtype=INT), max_seqlen_k=50)
    with pytest.raises(ValueError, match="20 keys of sequence 1, got 19"):
        call(prompt_lens=[40, 19])


def test_good_calls_of_the_tables_pass():
    assert call().shape == paged().shape == (50, 4, 16)


def test_gradients_are_refused_where_they_would_be_needed():
    with pytest.raises(sa.UnsupportedError, match="no_grad"):
        call(q=Q.clone().requires_grad_())
    with torch.no_grad():
        call(q=Q.clone().requires_grad_())
