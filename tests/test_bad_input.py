"""Wrong arguments: each a ValueError that names the argument, what was expected, what came and the way out.

Arguments that are wrong whatever the tensors: tests/safety/test_safety_misuse.py. Policies: tests/policies.
"""

import dataclasses
import re
import warnings

import pytest
import torch

import stem_attention as sa
from stem_attention import checks
from stem_attention.testing import borders, make_qkv

POLICY = sa.Stem(block_size=16)
CALLS = {
    "stem_attention": lambda *qkv, **options: sa.stem_attention(*qkv, **{"policy": POLICY, "dense_below": 0, **options}),
    "with_lse": lambda *qkv, **options: sa.stem_attention(*qkv, return_lse=True, **{"dense_below": 0, **options}),
    "dense": sa.stem_attention,
    "select": lambda *qkv, **options: sa.select_blocks(*qkv, **{"policy": POLICY, **options}),
}


def attend(*qkv, **options):
    return sa.block_sparse_attention(*qkv, sa.select_blocks(*make_qkv(2, 40, 50, 4, 2, 16), policy=POLICY), **options)


ALL_CALLS = pytest.mark.parametrize("call", [*CALLS.values(), attend], ids=[*CALLS, "attend"])
CHOOSING_CALLS = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)

BAD_TENSORS = {
    "q_is_a_list": ("q", lambda q, k, v: ([1.0], k, v), "pass a torch.Tensor"),
    "q_rank_3": ("q", lambda q, k, v: (q[0], k, v), "reshape"),
    "k_rank_5": ("k", lambda q, k, v: (q, k[None], v), "reshape"),
    "int_tensors": ("q", lambda q, k, v: (q.int(), k.int(), v.int()), ".to()"),
    "fp8_tensors": ("q", lambda *x: tuple(t.to(torch.float8_e4m3fn) for t in x), ".to()"),
    "k_other_dtype": ("k", lambda q, k, v: (q, k.half(), v.half()), ".to()"),
    "k_other_device": ("k", lambda q, k, v: (q, k.to("meta"), v), ".to()"),
    "v_other_device": ("v", lambda q, k, v: (q, k, v.to("meta")), ".to()"),
    "q_other_device": ("k", lambda q, k, v: (q.to("meta"), k, v), ".to()"),
    "q_last_dim_strided": ("q", lambda q, k, v: (q.mT.contiguous().mT, k, v), ".contiguous()"),
    "k_last_dim_strided": ("k", lambda q, k, v: (q, k.repeat(1, 1, 1, 2)[..., ::2], v), ".contiguous()"),
    "v_last_dim_expanded": ("v", lambda q, k, v: (q, k, v[..., :1].expand(-1, -1, -1, 16)), ".contiguous()"),
    "k_head_dim": ("k", lambda q, k, v: (q, k[..., :8], v[..., :8]), "last dimensions"),
    "v_head_dim": ("v", lambda q, k, v: (q, k, v[..., :0]), "last dimensions"),
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
    "heads_before_the_length": ("k", lambda q, k, v: (q.transpose(1, 2), *(x.transpose(1, 2) for x in (k, v))), "transpose"),
}


@ALL_CALLS
@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors(case, call):
    name, spoil, way_out = BAD_TENSORS[case]
    with pytest.raises(ValueError, match=f"^{name}: expected .+, got .+; .*{re.escape(way_out)}"):
        call(*spoil(*make_qkv(2, 40, 50, 4, 2, 16)))


OTHER_FACTORS = [[1.0] * 4] * 2, [[1.0] * 3], [[1.0] * 5]  # of two layers; of other heads


@CHOOSING_CALLS
@pytest.mark.parametrize(
    ("name", "value", "way_out"),
    [
        *(("prompt_len", length, "every token of the prompt") for length in (49, 2**31, 2**70)),
        *(("policy", sa.Mass(head_factors=factors), "pass policy.for_layer(layer)") for factors in OTHER_FACTORS),
        ("scale", float("nan"), "leave it out"),
        *(("softcap", cap, "without a cap") for cap in (0.0, -1, 201.0, float("inf"), True, "50")),
        ("backend", "flash", 'use "auto"'),
    ],
)
def test_other_arguments(name, value, way_out, call):
    with pytest.raises(ValueError, match=f"^{name}: expected .+, got .+; .*{re.escape(way_out)}"):
        call(*make_qkv(2, 40, 50, 4, 2, 16), **{name: value})


def test_a_limit_above_64_bits_runs_every_prompt_dense():
    q, k, v = make_qkv(2, 40, 50, 4, 2, 16)
    expected = sa.stem_attention(q, k, v, dense_below=51, return_lse=True)
    assert all(map(torch.equal, sa.stem_attention(q, k, v, dense_below=2**70, return_lse=True), expected))
    assert torch.equal(varlen(dense_below=2**70), varlen(dense_below=41))


def test_a_selection_for_other_shapes_or_on_another_device():
    for shape in ((1, 40, 50, 4), (2, 40, 50, 2), (2, 41, 50, 4), (2, 40, 51, 4)):
        with pytest.raises(ValueError, match=r"^selection: expected .*\(batch, q_heads, q_len, kv_len\) = .+, got .+; select"):
            attend(*make_qkv(*shape, 2, 16))
    q, k, v = make_qkv(2, 40, 50, 4, 2, 16)
    made = sa.select_blocks(q, k, v, policy=POLICY)
    for moved in ("indices", "counts"):
        elsewhere = dataclasses.replace(made, **{moved: getattr(made, moved).to("meta")})
        with pytest.raises(ValueError, match=r"^selection: expected the device of q, cpu, got meta; move it"):
            sa.block_sparse_attention(q, k, v, elsewhere)


def varlen(**changes):
    """A good call of two sequences (30 of 40 and 20 of 20 tokens), with some arguments replaced."""
    q, k, v = (x[0] for x in make_qkv(1, 50, 60, 4, 2, 16))
    lengths = {"cu_seqlens_q": borders([30, 20]), "cu_seqlens_k": borders([40, 20]), "max_seqlen_q": 30, "max_seqlen_k": 40}
    return sa.stem_attention_varlen(**{"q": q, "k": k, "v": v, **lengths, "policy": POLICY, "dense_below": 0, **changes})


def paged(**changes):
    """The same on a cache of 5 pages of 16 tokens."""
    cache, table = torch.ones(5, 16, 2, 16), torch.tensor([[3, 0, 4], [1, 2, -1]], dtype=torch.int32)
    return varlen(**{"k": cache, "v": cache, "page_table": table, **changes})


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


BAD_BATCHES = {
    "cu_q_starts_late": ("cu_seqlens_q", {"cu_seqlens_q": ints(1, 30, 50)}, "start at 0"),
    "cu_q_falls": ("cu_seqlens_q", {"cu_seqlens_q": ints(0, 51, 50)}, "never fall"),
    "cu_q_ends_early": ("cu_seqlens_q", {"cu_seqlens_q": ints(0, 30, 49)}, "end at 50"),
    "cu_q_elsewhere": ("cu_seqlens_q", {"cu_seqlens_q": ints(0, 30, 50).to("meta")}, "move it"),
    "cu_k_ends_early": ("cu_seqlens_k", {"cu_seqlens_k": ints(0, 40, 59)}, "end at 60"),
    "cu_k_of_three": ("cu_seqlens_k", {"cu_seqlens_k": ints(0, 40, 50, 60)}, "list every sequence"),
    "cu_k_shorter_than_q": ("cu_seqlens_k", {"cu_seqlens_k": ints(0, 50, 60), "max_seqlen_k": 50}, "in sequence 1, got 10"),
    "max_q_too_small": ("max_seqlen_q", {"max_seqlen_q": 29}, "take it from cu_seqlens_q"),
    "max_k_too_small": ("max_seqlen_k", {"max_seqlen_k": 39}, "take it from cu_seqlens_k"),
    "prompt_lens_tensor": ("prompt_lens", {"prompt_lens": torch.tensor([40, 20])}, ".tolist()"),
    "prompt_lens_too_short": ("prompt_lens", {"prompt_lens": [40, 19]}, "20 keys of sequence 1, got 19"),
    "prompt_lens_too_long": ("prompt_lens", {"prompt_lens": [40, 2**70]}, "every token of the prompt"),
    "q_of_rank_4": ("q", {"q": torch.ones(1, 50, 4, 16)}, "(total, heads, dim)"),
}
BAD_PAGES = {
    "table_elsewhere": ("page_table", {"page_table": ints([0, 1, 2], [3, 4, 0]).to("meta")}, "meta"),
    "table_of_one_sequence": ("page_table", {"page_table": ints([0, 1, 2])}, "2 rows"),
    "table_too_narrow": ("page_table", {"page_table": ints([0, 1], [2, 3])}, "3 pages for sequence 0"),
    "page_too_large": ("page_table", {"page_table": ints([3, 0, 4], [1, 5, 0])}, "sequence 1"),
    "page_negative": ("page_table", {"page_table": ints([3, -1, 4], [1, 2, 0])}, "sequence 0"),
    "packed_keys": ("k", {"k": torch.ones(60, 2, 16)}, "paged cache"),
    "pages_of_no_tokens": ("k", {"k": torch.ones(5, 0, 2, 16), "v": torch.ones(5, 0, 2, 16)}, "page_size"),
    "values_of_other_page_size": ("v", {"v": torch.ones(5, 8, 2, 16)}, "shape of k"),
    "strided_last_dim": ("k", {"k": torch.ones(5, 16, 16, 2).mT}, "contiguous last dimension"),
    "other_dtype": ("k", {"k": torch.ones(5, 16, 2, 16).half()}, "dtype of q"),
    "head_dim": ("k", {"k": torch.ones(5, 16, 2, 8), "v": torch.ones(5, 16, 2, 8)}, "head dimension"),
}


@pytest.mark.parametrize(
    ("call", "name", "changes", "detail"),
    [
        pytest.param(call, *row, id=case)
        for call, table in ((varlen, BAD_BATCHES), (paged, BAD_PAGES))
        for case, row in table.items()
    ],
)
def test_bad_batches_and_pages(call, name, changes, detail):
    with pytest.raises(ValueError, match=f"^{name}: expected .+, got .+; .+") as refused:
        call(**changes)
    assert detail in str(refused.value)


def test_good_input_of_the_tables_passes():
    for call in (*CALLS.values(), attend):
        assert call(*make_qkv(2, 40, 50, 4, 2, 16)) is not None
    assert varlen().shape == paged().shape == (50, 4, 16)


def told_of(call, *shapes):
    """What is warned of in calls with tensors of these shapes."""
    checks._told_of_layout.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for q_shape, k_shape in shapes:
            call(torch.zeros(q_shape), torch.zeros(k_shape), torch.zeros(k_shape))
    return [warning for warning in caught if "transpose" in str(warning.message)]


HEADS_FIRST = [((2, 8, length, 16), (2, 8, length, 16)) for length in (300, 400)]


@pytest.mark.parametrize("call", [sa.stem_attention, sa.select_blocks])
def test_heads_before_the_length_are_warned_of_once_with_the_shapes(call):
    (warning,) = told_of(call, *HEADS_FIRST)
    assert "got (2, 8, 300, 16)" in str(warning.message)
    assert ".transpose(1, 2)" in str(warning.message)
    assert warning.filename == __file__


def test_short_prompts_of_many_heads_and_compiled_code_are_not_warned_of():
    for q_shape, k_shape in (
        ((1, 1, 256, 16), (1, 1, 256, 16)),  # a token of as many heads as any model has
        ((1, 3, 128, 16), (1, 3, 128, 16)),  # a short prompt of DeepSeek-V3
        ((1, 1, 300, 16), (1, 900, 300, 16)),  # a chunk: more keys than queries
        ((1, 2, 512, 16), (1, 2, 64, 16)),  # grouped heads
        ((1, 65, 260, 16), (1, 65, 260, 16)),
        ((1, 0, 300, 16), (1, 0, 300, 16)),
    ):
        assert not told_of(sa.stem_attention, (q_shape, k_shape)), q_shape
    torch.compiler.reset()
    compiled = torch.compile(sa.stem_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    assert not told_of(compiled, *HEADS_FIRST)


BAD_SINKS = {
    "a list": ([0.0] * 4, "each query head"),
    "of other heads": (torch.zeros(2), "a rank passes those of its heads"),
    "of each query": (torch.zeros(4, 1), "each query head"),
    "of another dtype": (torch.zeros(4, dtype=torch.float16), ".float()"),
    "elsewhere": (torch.zeros(4, device="meta"), "move it"),
    "strided": (torch.zeros(8)[::2], ".contiguous()"),
}


@pytest.mark.parametrize(
    "call", [CALLS["stem_attention"], CALLS["dense"], attend, None], ids=["sparse", "dense", "lists", "packed"]
)
@pytest.mark.parametrize("case", BAD_SINKS)
def test_bad_sinks(case, call):
    sinks, way_out = BAD_SINKS[case]
    with pytest.raises(ValueError, match=f"^sinks: expected (.+, got .+; )?.*{re.escape(way_out)}"):
        varlen(sinks=sinks) if call is None else call(*make_qkv(2, 40, 50, 4, 2, 16), sinks=sinks)
