"""The operators under torch.compile: one graph, static and dynamic shapes, the same numbers as eager."""

from itertools import product

import pytest
import torch

import stem_attention as sa
from stem_attention import ops
from stem_attention.policies import parse_spec, policy_names
from stem_attention.testing import make_qkv, random_selection, structured_qkv

pytestmark = pytest.mark.newer_host

SPARSE = sa.Stem(block_size=16, min_blocks=3, sink_blocks=1, local_blocks=1, tail_blocks=1)
# Forced blocks on top of the scored ones: where they overlap, heads keep different numbers of blocks.
EXTRA = sa.Stem(block_size=16, min_blocks=3, sink_blocks=2, local_blocks=2, tail_blocks=0, forced="extra", magnitude="zscore")
FACTORS = sa.Mass(block_size=16, query_pool=4, key_pool=4, tail_blocks=1, head_factors=[[0.3, 1.0, 2.0, 8.0]])
SHAPES = ((2, 100, 130), (2, 150, 150), (1, 33, 300))  # batch, q_len, kv_len


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch.compiler.reset()


def attention(q, k, v):
    return sa.stem_attention(q, k, v, policy=SPARSE, dense_below=64) * 2


def attention_with_lse(q, k, v):
    out, lse = sa.stem_attention(q, k, v, policy=SPARSE, dense_below=64, return_lse=True, prompt_len=k.shape[1] + 50)
    return out + 1, lse + 1


def dense(q, k, v):
    return sa.stem_attention(q, k, v), *sa.stem_attention(q, k, v, return_lse=True)


def attention_with_sinks_and_a_cap(q, k, v):
    extra = {"sinks": q[0, 0, :, 0].contiguous(), "softcap": 2.0}
    sparse, short = (sa.stem_attention(q, k, v, policy=SPARSE, dense_below=limit, **extra) for limit in (0, 1000))
    selection = sa.select_blocks(q, k, v, policy=SPARSE, softcap=2.0)
    windowed = sa.block_sparse_attention(q, k, v, selection, window=70, **extra)
    return sparse + 1, short, windowed + 1, *sa.block_sparse_attention(q, k, v, selection, return_lse=True, **extra)


def two_steps(q, k, v, policy=SPARSE):
    selection = sa.select_blocks(q, k, v, policy=policy)
    out, lse = sa.block_sparse_attention(q, k, v, selection, return_lse=True)
    return out + 1, lse, selection.counts + 1


def two_steps_of_heads_with_shares(q, k, v):
    return *two_steps(q, k, v, FACTORS), sa.stem_attention(q, k, v, policy=FACTORS, dense_below=64)


def two_steps_of_ragged_rows(q, k, v):
    return two_steps(q, k, v, EXTRA)


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def same(result, expected):
    pairs = list(zip(as_tuple(result), as_tuple(expected), strict=True))
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in pairs)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "function",
    [
        attention,
        attention_with_lse,
        attention_with_sinks_and_a_cap,
        two_steps,
        two_steps_of_ragged_rows,
        two_steps_of_heads_with_shares,
    ],
)
def test_compiled_equals_eager(function, dynamic):
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for i, (batch, q_len, kv_len) in enumerate(SHAPES):
        inputs = structured_qkv(batch, q_len, kv_len, 4, 2, 16, seed=i)
        assert same(compiled(*inputs), function(*inputs))


@pytest.mark.parametrize("name", policy_names())
def test_every_policy_compiles(name):
    def function(q, k, v):
        return two_steps(q, k, v, policy)

    policy, inputs = parse_spec(name).policy, structured_qkv(1, 300, 300, 2, 1, 16)
    assert same(torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs), function(*inputs))


@pytest.mark.parametrize("function", [attention, two_steps])
def test_dynamic_shapes_are_compiled_once(function):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for length in (100, 200, 333, 511):
        inputs = structured_qkv(2, length, length, 4, 2, 16)
        assert same(compiled(*inputs), function(*inputs))
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("function", [attention_with_lse, two_steps])
def test_an_exported_program_takes_other_lengths(function, strict):
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return function(q, k, v)

    free, inputs = {1: torch.export.Dim("length", min=70, max=900)}, structured_qkv(2, 100, 100, 4, 2, 16)
    exported = torch.export.export(Model(), inputs, dynamic_shapes=(free, free, free), strict=strict)
    others = structured_qkv(2, 333, 333, 4, 2, 16)
    assert same(exported.module()(*others), function(*others))


def test_inductor_keeps_the_graph_whole_and_the_numbers_equal():
    inputs = structured_qkv(1, 200, 200, 4, 2, 16)
    compiled = torch.compile(two_steps, fullgraph=True)
    assert same(compiled(*inputs), two_steps(*inputs))


def test_a_strided_view_and_the_dense_path_keep_the_promised_layout():
    # The dense path returns what torch's attention made; the graph was promised a contiguous tensor.
    def function(q, k, v):
        return sa.stem_attention(q, k, v).view(q.shape[0], q.shape[1], -1)

    inputs = structured_qkv(2, 50, 80, 4, 2, 16, layout="bhsd")
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert same(compiled(*inputs), function(*inputs))


def test_compiled_code_raises_the_same_errors():
    compiled = torch.compile(two_steps, fullgraph=True, backend="aot_eager")
    q, k, v = make_qkv(1, 100, 100, 4, 2, 16)
    with pytest.raises((ValueError, torch._dynamo.exc.Unsupported), match="last dimensions"):
        compiled(q, k[..., :8], v[..., :8])
    with pytest.raises((ValueError, torch._dynamo.exc.Unsupported), match="read_policy"):
        compiled(q, k, v, "mass:share=8")
    building = torch.compile(lambda *qkv: two_steps(*qkv, sa.Mass(share=8)), fullgraph=True, backend="aot_eager")
    with pytest.raises((ValueError, torch._dynamo.exc.Unsupported), match="outside of the compiled function"):
        building(q, k, v)


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize(
    ("layout", "sinks", "cap"), [("bshd", None, 2.0), ("fused", None, None), ("bshd", torch.ones(4), None)]
)
def test_opcheck_of_attention(layout, sinks, cap, return_lse):
    q, k, v = structured_qkv(2, 100, 130, 4, 2, 16, layout=layout)
    for policy, dense_below in product((SPARSE, EXTRA, FACTORS), (0, None)):
        arguments = ops.Arguments(q, k, v, sinks, policy.to_json(), 0.25, cap, [130], "auto", dense_below, return_lse)
        torch.library.opcheck(ops.attention, arguments)
    selection = random_selection(2, 4, 100, 130, 16)
    lists = {"indices": selection.indices, "counts": selection.counts, "block_size": 16}
    torch.library.opcheck(ops.attention, arguments._replace(**lists, policy=None, window=20))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("policy", [SPARSE, EXTRA, FACTORS])
@pytest.mark.parametrize("q_len", [1, 100])
def test_opcheck_of_select(q_len, policy, backend):
    q, k, v = structured_qkv(2, q_len, 130, 4, 2, 16, layout="fused")
    torch.library.opcheck(ops.select, (q, k, v, None, policy.to_json(), 0.25, None, [200], backend))


def test_the_width_of_a_selection_is_the_budget_even_where_no_row_fills_it():
    q, k, v = structured_qkv(1, 1, 130, 1, 1, 16)
    ours, theirs = (sa.select_blocks(q, k, v, policy=EXTRA, prompt_len=200, backend=b) for b in ("torch", "reference"))
    assert ours.counts.max() < ours.indices.shape[3]  # or this example shows nothing
    assert torch.equal(ours.indices, theirs.indices)
    torch.library.opcheck(ops.select, (q, k, v, None, EXTRA.to_json(), 0.25, None, [200], "reference"))


@pytest.mark.parametrize("q_len", [0, 1, 130])
@pytest.mark.parametrize("policy", [SPARSE, EXTRA])
@pytest.mark.parametrize("dense_below", [64, 1000])
def test_meta_tensors_get_the_shapes_that_real_ones_get(dense_below, policy, q_len):
    real = make_qkv(2, q_len, 130, 4, 2, 16, dtype=torch.bfloat16)
    options = {"policy": policy, "dense_below": dense_below}
    got, expected = (
        [*sa.stem_attention(*inputs, **options, return_lse=True), sa.stem_attention(*inputs, **options)]
        for inputs in ([x.to("meta") for x in real], real)
    )
    for x, y in zip(got, expected, strict=True):
        assert (x.shape, x.dtype, x.device.type) == (y.shape, y.dtype, "meta")


@pytest.mark.parametrize(
    "mode", [torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)], ids=["inference", "autocast"]
)
@pytest.mark.parametrize("function", [attention, attention_with_lse, dense, two_steps])
def test_inference_mode_and_autocast_change_nothing_eager_and_compiled(function, mode):
    inputs = structured_qkv(1, 100, 130, 4, 2, 16)
    expected = function(*inputs)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with mode:
        assert same(function(*inputs), expected)
        assert same(compiled(*inputs), expected)


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("paged", [False, True])
def test_opcheck_of_packed_attention(paged, return_lse):
    q, k, v = (x[0] for x in make_qkv(1, 48, 80, 4, 2, 16))
    table = torch.arange(5, dtype=torch.int32).view(1, 5) if paged else None
    k, v = (x.unflatten(0, (5, 16)) if paged else x for x in (k, v))
    where = {"q_starts": [0, 48], "k_starts": [0, 80], "page_table": table}
    given = ops.Arguments(q, k, v, None, SPARSE.to_json(), 0.25, 2.0, [80], "auto", 0, return_lse, **where)
    torch.library.opcheck(ops.attention, given)
