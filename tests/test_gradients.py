"""Gradients for a fixed selection: against finite differences, autograd of plain masked attention, and bit by bit."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stem_attention as sa
from stem_attention import ops
from stem_attention.backends.kept import pack as pack_bits
from stem_attention.backends.kept import unpack
from stem_attention.policies.patterns import keep_everything
from stem_attention.testing import exact_attention, make_qkv, pack, random_selection, relative_error, structured_qkv, token_mask

BACKENDS = ("torch", "reference")
SPARSE = sa.Stem(block_size=16, min_blocks=3, sink_blocks=1, local_blocks=1, tail_blocks=1, stride=8)
MASS = sa.Mass(block_size=16, query_pool=4, key_pool=8, tail_blocks=1, local_blocks=1, share=2.0)


def leaves(*tensors):
    return tuple(x.detach().clone().requires_grad_() for x in tensors)


def gradients(results, inputs, seed=0):
    """Gradients of a random sum of the results, fp32 weights for all."""
    draw = torch.Generator().manual_seed(seed)
    total = sum((x.double() * torch.randn(x.shape, generator=draw).double()).sum() for x in results)
    return torch.autograd.grad(total, inputs)


def exact(q, k, v, selection, results=2, scale=None, seed=0):
    """The same, through masked attention in fp64 that torch differentiates."""
    inputs = leaves(*(x.double() for x in (q, k, v)))
    return gradients(exact_attention(*inputs, token_mask(selection), scale)[:results], inputs, seed)


def errors(found, expected):
    return [relative_error(x, y) for x, y in zip(found, expected, strict=True)]


SHAPES = st.tuples(
    st.integers(1, 2), st.integers(1, 40), st.integers(0, 30), st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2), (6, 2)]),
    st.sampled_from([1, 3, 8]), st.sampled_from([4, 16]), st.integers(0, 99),
)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@given(shape=SHAPES)
@settings(max_examples=25, deadline=None)
def test_gradcheck(backend, shape):
    batch, q_len, more, heads, dim, size, seed = shape
    inputs = leaves(*make_qkv(batch, q_len, q_len + more, *heads, dim, dtype=torch.float64, seed=seed))
    selection = random_selection(batch, heads[0], q_len, q_len + more, size, seed=seed)

    def function(q, k, v):
        return sa.block_sparse_attention(q, k, v, selection, return_lse=True, backend=backend)

    out_alone = torch.autograd.gradcheck(lambda *x: function(*x)[0], inputs, fast_mode=True)
    # The log-sum-exp is fp32, too coarse for finite differences.
    found = gradients(function(*inputs), inputs, seed)
    assert out_alone
    assert max(errors(found, exact(*inputs, selection, seed=seed))) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.0, -0.7, 2.0])
@pytest.mark.parametrize("layout", ["bshd", "bhsd", "fused"])
def test_any_scale_and_layout(layout, scale, backend):
    q, k, v = structured_qkv(2, 70, 101, 4, 2, 16, dtype=torch.float64, layout=layout)
    selection = random_selection(2, 4, 70, 101, 16)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    found = gradients(sa.block_sparse_attention(*inputs, selection, return_lse=True, scale=scale, backend=backend), inputs)
    assert max(errors(found, exact(q, k, v, selection, scale=scale))) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_error_is_at_most_twice_that_of_sdpa(dtype, backend):
    inputs = leaves(*make_qkv(1, 300, 300, 4, 2, 32, dtype=dtype))
    selection = keep_everything(*inputs[:2], 64)
    ours = gradients([sa.block_sparse_attention(*inputs, selection, backend=backend)], inputs)
    theirs = gradients([sa.stem_attention(*inputs, dense_below=301)], inputs)
    judge = exact(*inputs, selection, results=1)
    assert [x.dtype for x in ours] == [dtype] * 3
    for mine, its in zip(errors(ours, judge), errors(theirs, judge), strict=True):
        assert 0 < mine <= 2 * its


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_sinks_have_a_gradient_and_change_the_others(backend, packed):
    q, k, v = structured_qkv(1, 90, 130, 4, 2, 16, dtype=torch.float64)
    selection = sa.select_blocks(q, k, v, policy=SPARSE)
    inputs = leaves(q, k, v, torch.tensor([-1.0, 0.0, 2.0, 5.0]))
    options = {"sinks": inputs[3], "policy": SPARSE, "dense_below": 0, "return_lse": True, "backend": backend}
    if packed:
        starts = (torch.tensor([0, n], dtype=torch.int32) for n in (90, 130))
        rows = [x[0] for x in inputs[:3]]
        results = [x[None] for x in sa.stem_attention_varlen(*rows, *starts, 90, 130, **options)]
    else:
        results = sa.stem_attention(*inputs[:3], **options)
    found = gradients(results, inputs)
    plain = leaves(*(x.double() for x in inputs))
    out, lse = exact_attention(*plain[:3], token_mask(selection))
    logits = plain[3][:, None]
    expected = gradients((out * torch.sigmoid(lse - logits).mT[..., None], torch.logaddexp(lse, logits)), plain)
    assert max(errors(found, expected)) < 2e-6
    assert found[3].abs().min() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", ["stem_attention", "stem_attention_varlen", "block_sparse_attention"])
@pytest.mark.parametrize(("softcap", "value_dim"), [(0.5, 16), (None, 8), (3.0, 24)])
def test_soft_caps_and_values_of_another_dimension(softcap, value_dim, call, backend):
    q, k, v = make_qkv(1, 90, 130, 4, 2, 16, dtype=torch.float64, value_dim=value_dim)
    sinks = torch.tensor([-1.0, 0.0, 2.0, 5.0])
    selection = sa.select_blocks(q, k, v, policy=SPARSE, softcap=softcap)
    inputs = leaves(q, k, v, sinks)
    options = {"softcap": softcap, "sinks": inputs[3], "return_lse": True, "backend": backend}
    if call == "block_sparse_attention":
        results = sa.block_sparse_attention(*inputs[:3], selection, **options)
    elif call == "stem_attention":
        results = sa.stem_attention(*inputs[:3], policy=SPARSE, dense_below=0, **options)
    else:
        starts = (torch.tensor([0, n], dtype=torch.int32) for n in (90, 130))
        rows = [x[0] for x in inputs[:3]]
        results = [x[None] for x in sa.stem_attention_varlen(*rows, *starts, 90, 130, policy=SPARSE, dense_below=0, **options)]
    plain = leaves(*(x.double() for x in inputs))
    judge = exact_attention(*plain[:3], token_mask(selection), sinks=plain[3], softcap=softcap)
    assert max(errors(gradients(results, inputs), gradients(judge, plain))) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_under_a_soft_cap(backend):
    inputs = leaves(*make_qkv(1, 20, 33, 4, 2, 8, dtype=torch.float64, value_dim=5))
    selection = random_selection(1, 4, 20, 33, 4)

    def function(*qkv):
        return sa.block_sparse_attention(*qkv, selection, softcap=0.7, backend=backend)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_frozen_sinks_cost_nothing():
    inputs, sinks = leaves(*make_qkv(1, 90, 90, 4, 2, 16)), torch.randn(4)
    out = sa.stem_attention(*inputs, sinks=sinks, policy=SPARSE, dense_below=0)
    with torch.profiler.profile() as profile:
        out.sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert "stem_attention::backward" in names
    assert "aten::exp" not in names  # of a sink's weight; those of keys are made in place


def test_windows_are_refused_but_one_that_hides_nothing():
    inputs, selection = leaves(*make_qkv(1, 40, 40, 2, 1, 16)), random_selection(1, 2, 40, 40, 16)
    for window in (7, 39):
        with pytest.raises(sa.UnsupportedError, match="windows.*detach"):
            sa.block_sparse_attention(*inputs, selection, window=window)
    found, expected = (
        torch.autograd.grad(sa.block_sparse_attention(*inputs, selection, window=window).square().sum(), inputs)
        for window in (40, None)
    )
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("policy", [SPARSE, MASS])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_whole_call_has_the_gradient_of_its_selection(backend, policy):
    q, k, v = structured_qkv(2, 150, 210, 4, 2, 16, dtype=torch.float64)
    selection = sa.select_blocks(q, k, v, policy=policy)
    assert selection.density() < 0.8
    inputs = leaves(q, k, v)
    found = gradients(sa.stem_attention(*inputs, policy=policy, dense_below=0, return_lse=True, backend=backend), inputs)
    assert max(errors(found, exact(q, k, v, selection))) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_packed_batch_has_the_gradients_of_its_sequences(backend):
    parts = [
        structured_qkv(1, *lengths, 4, 2, 16, seed=i) for i, lengths in enumerate([(100, 100), (1, 60), (33, 140), (0, 20)])
    ]
    options = {"policy": SPARSE, "dense_below": 50, "return_lse": True, "backend": backend}
    packed = pack(parts)
    inputs = [packed[name].requires_grad_() for name in "qkv"]
    out, lse = sa.stem_attention_varlen(**packed, **options)
    weights, norm_weights = torch.randn_like(out), torch.randn_like(lse)
    found = torch.autograd.grad((out * weights).sum() + (lse * norm_weights).sum(), inputs)
    starts = [packed[name].tolist() for name in ("cu_seqlens_q", "cu_seqlens_k")]
    for part, (q0, q1), (k0, k1) in zip(parts, *map(pairwise, starts), strict=True):
        alone = leaves(*part)
        out, lse = sa.stem_attention(*alone, **options)
        loss = (out[0] * weights[q0:q1]).sum() + (lse[0] * norm_weights[:, q0:q1]).sum()
        expected = torch.autograd.grad(loss, alone, allow_unused=True, materialize_grads=True)
        assert torch.equal(found[0][q0:q1], expected[0][0])
        assert all(torch.equal(x[k0:k1], y[0]) for x, y in zip(found[1:], expected[1:], strict=True))


def test_dense_calls_are_differentiated_by_torch():
    inputs = leaves(*make_qkv(1, 90, 90, 4, 2, 16))
    q, k, v = (x.transpose(1, 2) for x in inputs)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    found = gradients([sa.stem_attention(*inputs)], inputs)
    assert all(torch.equal(x, y) for x, y in zip(found, gradients([expected], inputs), strict=True))


def test_a_gradient_may_be_wanted_of_some_inputs_alone_and_be_a_view():
    q, k, v = make_qkv(1, 90, 90, 4, 2, 16)
    wanted = leaves(k)[0]
    sa.stem_attention(q, wanted, v, policy=SPARSE, dense_below=0).sum().backward()  # the gradient of a sum has strides of 0
    every = leaves(q, k, v)
    sa.stem_attention(*every, policy=SPARSE, dense_below=0).backward(torch.ones(1, 90, 4, 16))
    assert wanted.grad is not None
    assert torch.equal(wanted.grad, every[1].grad)


def test_no_queries_give_zeros():
    inputs = leaves(*make_qkv(2, 0, 40, 4, 2, 16))
    sa.stem_attention(*inputs, policy=SPARSE, dense_below=0).sum().backward()
    assert all(x.grad.shape == x.shape and not x.grad.any() for x in inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_that_nobody_keeps_get_zeros_and_are_not_read(backend):
    """Of the last row's result: it keeps the first block and its own."""
    q, k, v = make_qkv(1, 128, 128, 2, 1, 16)
    lists = [[[[row] if row < 4 else [0, row] for row in range(8)], [[0, row] if row else [0] for row in range(8)]]]
    lists[0][0][6] = lists[0][1][6] = [0, 6]
    selection = sa.BlockSelection.from_lists(lists, block_size=16, q_len=128, kv_len=128)

    def of_last_row(*inputs):
        out = sa.block_sparse_attention(*inputs, selection, backend=backend)
        return torch.autograd.grad(out[:, 112:].sum(), inputs)

    found = of_last_row(*leaves(q, k, v))
    for gradient in found[1:]:
        assert gradient[:, 112:].any()
        assert gradient[:, :16].any()
        assert not gradient[:, 16:112].any()
    for x in (k, v):
        x[:, 16:112] = math.nan
    assert torch.equal(of_last_row(*leaves(q, k, v))[0][:, 112:], found[0][:, 112:])


def test_a_hundred_runs_give_the_same_bits():
    inputs = leaves(*structured_qkv(1, 300, 300, 4, 2, 16))

    def run():
        return gradients(sa.stem_attention(*inputs, policy=SPARSE, dense_below=0, return_lse=True), inputs)

    first = run()
    assert all(torch.equal(x, y) for _ in range(100) for x, y in zip(run(), first, strict=True))


def test_what_lies_between_the_passes_is_linear_in_the_length_but_for_bits():
    saved = []

    def note(x):
        saved.append(x.numel() * x.element_size())
        return x

    def between(length):
        saved.clear()
        inputs = leaves(*make_qkv(1, length, length, 2, 1, 16))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            sa.stem_attention(*inputs, policy=SPARSE, dense_below=0)
        return sum(saved), max(saved)

    (small, _), (large, largest) = between(1024), between(4096)
    assert large < 4.5 * small
    assert largest == 4096 * 2 * 16 * 4  # q, and out


def test_bits_and_lists_tell_the_same():
    for q_len, kv_len, size in ((70, 101, 16), (1, 1, 16), (700, 1200, 8), (513, 513, 16)):
        selection = random_selection(2, 3, q_len, kv_len, size)
        bits = pack_bits(selection)
        wider = torch.nn.functional.pad(bits, (0, 2, 0, 1))
        found = unpack(wider, selection.grid)
        found.validate()
        assert torch.equal(found.to_mask(), selection.to_mask())
        assert torch.equal(found.counts, selection.counts)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_gradients_are_the_eager_ones(dynamic, compiler):
    def function(q, k, v):
        selection = sa.select_blocks(q, k, v, policy=MASS)
        out, lse = sa.stem_attention(q, k, v, policy=SPARSE, dense_below=64, return_lse=True)
        return out + 1, lse * 2, sa.block_sparse_attention(q, k, v, selection), sa.stem_attention(q, k, v)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=compiler)
    for q_len, kv_len in ((100, 130), (150, 150), (33, 60)) if compiler == "aot_eager" else ((100, 130),):
        inputs = leaves(*structured_qkv(2, q_len, kv_len, 4, 2, 16))
        expected, found = (gradients(run(*inputs), inputs) for run in (function, compiled))
        # What is dense runs eagerly as torch's own, compiled over everything kept.
        assert max(errors(found, expected)) < 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_and_autocast_change_no_bit(reentrant):
    def function(q, k, v):
        return sa.stem_attention(q, k, v, policy=SPARSE, dense_below=0)

    inputs = leaves(*structured_qkv(1, 100, 130, 4, 2, 16))
    expected = gradients([function(*inputs)], inputs)
    checkpointed = torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=reentrant)
    draw = torch.randn(checkpointed.shape, generator=torch.Generator().manual_seed(0)).double()
    (checkpointed.double() * draw).sum().backward()
    assert all(torch.equal(x.grad, y) for x, y in zip(inputs, expected, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(x, y) for x, y in zip(gradients([function(*inputs)], inputs), expected, strict=True))


@pytest.mark.parametrize("sinks", [None, torch.randn(4)], ids=["plain", "sinks"])
@pytest.mark.parametrize("name", ["chosen", "given", "packed"])
def test_opcheck(name, sinks):
    q, k, v = structured_qkv(2, 100, 130, 4, 2, 16, value_dim=8)
    selection = random_selection(2, 4, 100, 130, 16)
    call = ops.Arguments(q, k, v, sinks, SPARSE.to_json(), 0.25, 5.0, [130], "auto", 0, True)
    if name == "given":
        call = call._replace(policy=None, indices=selection.indices, counts=selection.counts, block_size=16)
    elif name == "packed":
        starts = {"q_starts": [0, 40, 100], "k_starts": [0, 40, 130]}
        call = call._replace(q=q[0], k=k[0], v=v[0], prompt_lens=[40, 130], **starts)
    operators, tests = torch.ops.stem_attention, ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.attention_kept, call, test_utils=tests)
    out, lse, kept = operators.attention_kept(*call)
    for of_sinks in {False, sinks is not None}:
        rest = (out, lse, out, lse, kept, of_sinks, *call._replace(indices=None, counts=None))
        torch.library.opcheck(operators.backward, rest, test_utils=tests)
