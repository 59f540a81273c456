"""On a GPU: gradients as good as those of torch's own attention, the same in every run, in all that training uses."""

from itertools import pairwise

import pytest
import torch
from tests.rigs import equal

import stem_attention as sa
from stem_attention.backends.triton import backward, pieces
from stem_attention.testing import LAYOUTS, exact_attention, make_qkv, pack, random_selection, relative_error, token_mask

from .common import LENGTHS, MIB, at_most_extra_bytes, captured, no_synchronisation, on_gpu, random_qkv

pytestmark = [*on_gpu, pytest.mark.usefixtures("_return_memory")]


def leaves(*tensors):
    return tuple(x.detach().requires_grad_() for x in tensors)


def gradients(results, inputs):
    """Gradients of a random sum of the results."""
    draw = torch.Generator("cuda").manual_seed(0)
    total = sum((x.float() * torch.randn(x.shape, device="cuda", generator=draw)).sum() for x in results)
    return torch.autograd.grad(total, inputs)


def whole(inputs, policy, backend="auto", **options):
    """Gradients through a sparse call and its log-sum-exp."""
    return gradients(
        sa.stem_attention(*inputs, policy=policy, dense_below=0, return_lse=True, backend=backend, **options), inputs
    )


def assert_right(q, k, v, selection, backend="auto"):
    """Errors against fp64 are at most twice those of torch's own attention with the same mask."""
    inputs, mask = leaves(q, k, v), token_mask(selection)
    group = q.shape[2] // k.shape[2]
    ours = gradients([sa.block_sparse_attention(*inputs, selection, backend=backend)], inputs)
    repeated = (x.repeat_interleave(group, 2).transpose(1, 2) for x in inputs[1:])
    sdpa = torch.nn.functional.scaled_dot_product_attention(inputs[0].transpose(1, 2), *repeated, attn_mask=mask)
    theirs = gradients([sdpa.transpose(1, 2)], inputs)
    doubles = leaves(*(x.double() for x in inputs))
    exact = gradients(exact_attention(*doubles, mask)[:1], doubles)
    for mine, its, judge in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == q.dtype
        assert relative_error(mine, judge) <= 2 * relative_error(its, judge)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("block_size", [64, 128])
def test_every_head_dim_block_size_and_dtype(block_size, dim, dtype, backend):
    q, k, v = make_qkv(1, 700, 900, 4, 2, dim, dtype, "cuda")
    assert_right(q, k, v, random_selection(1, 4, 700, 900, block_size, device="cuda"), backend)


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize(("dim", "value_dim", "softcap"), [(128, 128, 2.0), (256, 256, 5.0), (192, 128, None), (64, 128, 2.0)])
def test_soft_caps_and_values_of_another_dimension(dim, value_dim, softcap, block_size):
    """Errors against fp64 are at most twice those of plain attention in bf16."""
    inputs = leaves(*make_qkv(1, 700, 900, 4, 2, dim, torch.bfloat16, "cuda", value_dim=value_dim))
    sinks = torch.randn(4, device="cuda").requires_grad_()
    selection = random_selection(1, 4, 700, 900, block_size, device="cuda")
    out = sa.block_sparse_attention(*inputs, selection, sinks=sinks, softcap=softcap)
    ours = gradients([out], (*inputs, sinks))
    again = gradients([sa.block_sparse_attention(*inputs, selection, sinks=sinks, softcap=softcap)], (*inputs, sinks))
    assert equal(ours, again)
    mask, peers = token_mask(selection), leaves(*inputs)
    q, k, v = (x.transpose(1, 2) for x in (peers[0], *(x.repeat_interleave(2, 2) for x in peers[1:])))
    scores = q @ k.mT * dim**-0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    column = sinks.detach().to(scores.dtype)[None, :, None, None].expand(1, 4, 700, 1)
    weights = torch.cat([scores.masked_fill(~mask, -torch.inf), column], -1).softmax(-1)[..., :-1]
    theirs = gradients([(weights @ v).transpose(1, 2)], peers)
    doubles = leaves(*(x.double() for x in (*inputs, sinks)))
    exact = gradients(exact_attention(*doubles[:3], mask, sinks=doubles[3], softcap=softcap)[:1], doubles)
    for mine, its, judge in zip(ours, theirs, exact, strict=False):
        assert relative_error(mine, judge) <= 2 * relative_error(its, judge)
    # Terms of random signs would nearly cancel, and their rounding be judged by what is left; those of squares have one sign.
    squares = sa.block_sparse_attention(*inputs, selection, sinks=sinks, softcap=softcap).float().square().sum()
    exactly = exact_attention(*doubles[:3], mask, sinks=doubles[3], softcap=softcap)[0].square().sum()
    assert relative_error(torch.autograd.grad(squares, sinks)[0], torch.autograd.grad(exactly, doubles[3])[0]) < 1e-2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [(1, 1), (7, 1), (6, 2), (8, 8)])
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (1, 400), (129, 129), (511, 777), (1009, 1009)])
def test_every_length_group_and_layout(q_len, kv_len, heads, layout):
    q, k, v = make_qkv(2, q_len, kv_len, *heads, 128, torch.bfloat16, "cuda", layout=layout)
    assert_right(q, k, v, random_selection(2, heads[0], q_len, kv_len, 64, device="cuda"))


@pytest.mark.parametrize("block_size", [64, 128])
def test_a_key_block_that_every_row_keeps_is_cut_and_summed(block_size):
    """512 rows of 4 heads keep the first block: more than a chunk's share of all entries."""
    size = 512 * block_size
    q, k, v = random_qkv(1, size, size, 4, 1, 64)
    rows = torch.arange(512, device="cuda")
    mask = (rows[:, None] == rows).expand(1, 4, -1, -1).clone()
    mask[..., 0] = True
    selection = sa.BlockSelection.from_mask(mask, block_size=block_size, q_len=size, kv_len=size)
    inputs = leaves(q, k, v)
    found = gradients([sa.block_sparse_attention(*inputs, selection)], inputs)
    again = gradients([sa.block_sparse_attention(*inputs, selection)], inputs)
    assert equal(found, again)
    halves = leaves(*(x.double() for x in (q, k, v)))
    outs = []
    for row in range(512):  # each query block against two key blocks, in fp64
        own, first = slice(row * block_size, (row + 1) * block_size), slice(0, block_size)
        spans = [own] if row == 0 else [first, own]
        keys, values = (torch.cat([x[:, span] for span in spans], 1) for x in halves[1:])
        seen = torch.ones(block_size, keys.shape[1], dtype=torch.bool, device="cuda").tril(keys.shape[1] - block_size)
        outs.append(exact_attention(halves[0][:, own], keys, values, seen)[0])
    expected = gradients([torch.cat(outs, 1)], halves)
    assert all(relative_error(x, y) < 0.01 for x, y in zip(found, expected, strict=True))


def test_a_packed_batch_has_the_gradients_of_its_sequences(rule, backend):
    parts = [random_qkv(1, q_len, kv_len, 8, 2, 128, seed=i) for i, (q_len, kv_len) in enumerate(LENGTHS)]
    packed, options = pack(parts), {"policy": rule(8), "dense_below": 0, "backend": backend}
    inputs = [packed[name].requires_grad_() for name in "qkv"]
    out = sa.stem_attention_varlen(**packed, **options)
    weights = torch.randn_like(out)
    found = torch.autograd.grad((out * weights).sum(), inputs)
    starts = [packed[name].tolist() for name in ("cu_seqlens_q", "cu_seqlens_k")]
    for part, (q0, q1), (k0, k1) in zip(parts, *map(pairwise, starts), strict=True):
        if q0 == q1:
            assert not any(x[k0:k1].any() for x in found[1:])
            continue
        alone = leaves(*part)
        loss = (sa.stem_attention(*alone, **options)[0] * weights[q0:q1]).sum()
        for x, y in zip((found[0][q0:q1], found[1][k0:k1], found[2][k0:k1]), torch.autograd.grad(loss, alone), strict=True):
            assert relative_error(x, y[0]) < 1e-2  # other tiles, other roundings


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("dim", [64, 128])
def test_what_a_neighbour_holds_reaches_no_gradient(dim, block_size, backend):
    parts = [
        random_qkv(1, q_len, kv_len, 4, 2, dim, seed=i) for i, (q_len, kv_len) in enumerate([(70, 300), (333, 500), (9, 90)])
    ]
    options = {"policy": sa.Mass(block_size=block_size), "dense_below": 0, "backend": backend}

    def run(middle):
        packed = pack([parts[0], middle, parts[2]])
        inputs = [packed[name].requires_grad_() for name in "qkv"]
        out = sa.stem_attention_varlen(**packed, **options)
        weights = torch.randn(out.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
        found = torch.autograd.grad((out * weights).sum(), inputs)
        return [x[rows] for x, low, high in zip(found, (70, 300, 300), (403, 800, 800), strict=True)
                for rows in (slice(None, low), slice(high, None))]  # fmt: skip

    assert equal(run([torch.full_like(x, torch.nan) for x in parts[1]]), run(parts[1]))


def test_a_hundred_runs_give_the_same_bits(rule, backend):
    inputs, policy = leaves(*random_qkv(1, 8000, 8000, 8, 2, 128)), rule(8)
    first = whole(inputs, policy, backend)
    assert all(equal(first, whole(inputs, policy, backend)) for _ in range(100))


def test_heads_in_runs_and_calls_in_pieces_change_no_bit(backend, monkeypatch):
    inputs = leaves(*random_qkv(2, 3000, 3500, 8, 4, 128))
    together = whole(inputs, sa.Mass(), backend)
    monkeypatch.setattr(backward, "LIST_BYTES", 1)
    assert equal(together, whole(inputs, sa.Mass(), backend))
    monkeypatch.setattr(pieces, "LIST_BYTES", 4 * 8 * 2 * 55 * 9)
    assert equal(together, whole(inputs, sa.Mass(), backend))


def test_the_host_never_waits(rule, backend):
    inputs, policy = leaves(*random_qkv(1, 8000, 8000, 8, 2, 128)), rule(8)
    first = whole(inputs, policy, backend)
    with no_synchronisation():
        again = whole(inputs, policy, backend)
    assert equal(first, again)


def test_a_graph_replays_forward_and_backward_with_new_numbers(rule, backend):
    inputs, policy = leaves(*random_qkv(1, 4000, 4000, 8, 2, 128)), rule(8)

    def step():
        out = sa.stem_attention(*inputs, policy=policy, dense_below=0, backend=backend)
        return torch.autograd.grad(out, inputs, torch.ones_like(out))

    graph, replayed = captured(step)
    with torch.no_grad():
        for x in inputs:
            x.mul_(0.7)
    graph.replay()
    assert equal(replayed, step())


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_compiler_takes_gradients_in_one_graph(dynamic, rule, backend):
    policy = rule(8)

    def layer(q, k, v):
        return sa.stem_attention(q * 1.5, k, v, policy=policy, dense_below=0, backend=backend) * 2

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for length in (3000, 2500):
        inputs = leaves(*random_qkv(1, length, length, 8, 2, 128))
        expected, found = (gradients([run(*inputs)], inputs) for run in (layer, compiled))
        assert all(relative_error(x, y) < 1e-2 for x, y in zip(found, expected, strict=True))


def test_checkpointing_changes_no_bit(rule):
    inputs, policy = leaves(*random_qkv(1, 5000, 5000, 8, 2, 128)), rule(8)

    def call(*qkv):
        return sa.stem_attention(*qkv, policy=policy, dense_below=0)

    again = torch.utils.checkpoint.checkpoint(call, *inputs, use_reentrant=False)
    assert equal(gradients([call(*inputs)], inputs), gradients([again], inputs))


def test_memory_between_and_in_the_passes_is_linear():
    """32K tokens of 32 heads: dense weights would take 64 GiB."""
    inputs = leaves(*random_qkv(1, 32768, 32768, 32, 8, 128))
    policy = sa.Mass()
    whole(inputs, policy)
    with at_most_extra_bytes(1400 * MIB):  # out and its gradients 256 MiB each, those of the test's own loss in fp32 besides
        out = sa.stem_attention(*inputs, policy=policy, dense_below=0)
        torch.autograd.grad(out, inputs, torch.ones_like(out))


def test_fp32_trains_on_the_torch_backend_with_the_same_bits():
    inputs = leaves(*make_qkv(1, 600, 600, 4, 2, 64, device="cuda"))
    selection = random_selection(1, 4, 600, 600, 64, device="cuda")
    found = gradients([sa.block_sparse_attention(*inputs, selection)], inputs)
    assert equal(found, gradients([sa.block_sparse_attention(*inputs, selection)], inputs))
    doubles = leaves(*(x.double() for x in inputs))
    exact = gradients(exact_attention(*doubles, token_mask(selection))[:1], doubles)
    assert all(relative_error(x, y) < 1e-4 for x, y in zip(found, exact, strict=True))
