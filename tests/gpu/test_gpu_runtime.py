"""On a GPU: what the calls cost the host and the memory, and how they live with graphs, streams and the compiler."""

import math

import pytest
import torch
from tests.rigs import equal

from stem_attention import Mass, Stem, block_sparse_attention, select_blocks, stem_attention, stem_attention_varlen
from stem_attention.backends.triton import pieces
from stem_attention.testing import make_qkv, pack, random_selection, relative_error

from .common import GIB, MIB, at_most_extra_bytes, free_memory, no_synchronisation, on_gpu, random_qkv

pytestmark = [*on_gpu, pytest.mark.usefixtures("_return_memory")]


@pytest.mark.parametrize("return_lse", [False, True])
def test_the_host_never_waits(return_lse, rule, backend):
    q, k, v = random_qkv(1, 8000, 8000, 8, 2, 128)
    policy, options = rule(8), {"return_lse": return_lse, "backend": backend}
    first = stem_attention(q, k, v, policy=policy, dense_below=0, **options)
    select_blocks(q, k, v, policy=policy)
    with no_synchronisation():
        again = stem_attention(q, k, v, policy=policy, dense_below=0, **options)
        selection = select_blocks(q, k, v, policy=policy)
        apart = block_sparse_attention(q, k, v, selection, **options)
    for results in (again, apart):
        assert equal(first, results) if return_lse else torch.equal(first, results)


def test_the_host_never_waits_at_a_length_it_has_not_seen(rule):
    q, k, v = random_qkv(1, 8000, 8000, 8, 2, 128)
    stem_attention(q, k, v, policy=rule(8), dense_below=0)
    with no_synchronisation():
        stem_attention(q[:, :7123], k[:, :7123], v[:, :7123], policy=rule(8), dense_below=0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_compiler_takes_the_calls_in_one_graph(dynamic, rule, backend):
    policy = rule(4)

    def layer(q, k, v):
        selection = select_blocks(q, k, v, policy=policy)
        whole = stem_attention(q * 1.5, k, v, policy=policy, dense_below=0, backend=backend)
        return whole + block_sparse_attention(q, k, v, selection, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for length in (3000, 2500):
        q, k, v = random_qkv(1, length, length, 4, 2, 64)
        assert relative_error(compiled(q, k, v), layer(q, k, v)) < 4e-3


def test_a_call_that_is_cut_gives_the_bits_of_one_that_is_not(rule, backend, monkeypatch):
    q, k, v = random_qkv(1, 5000, 6000, 4, 2, 128)
    options = {"policy": rule(4), "dense_below": 0, "return_lse": True, "backend": backend}
    whole = stem_attention(q, k, v, **options)
    monkeypatch.setattr(pieces, "LIST_BYTES", 4 * 4 * 94 * 20)
    assert equal(whole, stem_attention(q, k, v, **options))


def test_another_stream(rule, backend):
    q, k, v = random_qkv(1, 6000, 6000, 8, 2, 128)
    options = {"policy": rule(8), "dense_below": 0, "backend": backend}
    expected = stem_attention(q, k, v, **options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # work that stays on the other stream would be done before this ends
        copies = [x.clone() for x in (q, k, v)]
        out = stem_attention(*copies, **options)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_a_device_that_is_not_the_current_one(rule, backend):
    q, k, v = random_qkv(1, 3000, 3000, 4, 2, 128)
    options = {"policy": rule(4), "dense_below": 0, "backend": backend}
    expected = stem_attention(q, k, v, **options)
    out = stem_attention(*(x.to("cuda:1") for x in (q, k, v)), **options)
    assert out.device == torch.device("cuda:1")
    assert torch.equal(out.to("cuda:0"), expected)


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "fused"])
def test_attention_copies_nothing(layout, backend):
    q, k, v = make_qkv(1, 16384, 16384, 16, 16, 64, torch.bfloat16, "cuda", layout=layout)
    selection = random_selection(1, 16, 16384, 16384, 128, density=0.2, device="cuda")
    block_sparse_attention(q, k, v, selection, backend=backend)
    with at_most_extra_bytes(q.numel() * q.element_size() + MIB):
        block_sparse_attention(q, k, v, selection, backend=backend)


def test_the_selections_workspace_is_bounded():
    q, k, v = random_qkv(1, 131072, 131072, 32, 8, 128)
    selection = select_blocks(q, k, v, policy=Stem())
    lists = selection.indices.numel() * 4 + selection.counts.numel() * 4
    del selection
    with at_most_extra_bytes(lists + 256 * MIB):
        select_blocks(q, k, v, policy=Stem())


def test_room_for_lists_of_unknown_length_is_bounded(backend):
    q, k, v = random_qkv(1, 262144, 262144, 8, 2, 64)
    with at_most_extra_bytes(2 * q.numel() * q.element_size() + pieces.LIST_BYTES + 256 * MIB):
        stem_attention(q, k, v, policy=Mass(), backend=backend)


@pytest.mark.skipif(free_memory() < 14 * GIB, reason="needs 14 GiB of free GPU memory")
def test_offsets_beyond_2_to_the_31(rule, backend):
    tokens, stride = 4096, 1 << 20
    store = torch.zeros(tokens * stride, dtype=torch.bfloat16, device="cuda")
    shape = {"q": 4, "k": 2, "v": 2}
    small = dict(zip(shape, random_qkv(1, tokens, tokens, 4, 2, 128), strict=True))
    far = {}
    for i, (name, heads) in enumerate(shape.items()):
        far[name] = store.as_strided((1, tokens, heads, 128), (tokens * stride, stride, 128, 1), i * 1024)
        far[name].copy_(small[name])
    assert (tokens - 1) * stride > 2**31
    options = {"policy": rule(4), "dense_below": 0, "return_lse": True, "backend": backend}
    assert equal(stem_attention(**far, **options), stem_attention(**small, **options))


@pytest.mark.skipif(free_memory() < 30 * GIB, reason="needs 30 GiB of free GPU memory")
@pytest.mark.parametrize("policy", [Stem(), Mass()], ids=lambda policy: policy.name)
def test_a_million_tokens(policy):
    length = 1 << 20
    q, k, v = random_qkv(1, length, length, 32, 8, 128)
    with at_most_extra_bytes(q.numel() * q.element_size() + 3 * GIB // 2):
        out = stem_attention(q, k, v, policy=policy)
    assert out.numel() > 2**31
    for low in (0, 5_000 * 128, length - 3 * 128):
        high = low + 128
        chunk = (q[:, low:high], k[:, :high], v[:, :high])
        selection = select_blocks(*chunk, policy=policy, prompt_len=length)
        expected = block_sparse_attention(*chunk, selection, backend="reference")
        assert relative_error(out[:, low:high], expected) < 5e-3


@pytest.mark.skipif(free_memory() < 14 * GIB, reason="needs 14 GiB of free GPU memory")
@pytest.mark.parametrize("page", [16, 128])
def test_pages_beyond_2_to_the_31_elements(page, rule, backend):
    near = pack([random_qkv(1, 3000, 3000, 4, 2, 128)], page)
    first = (1 << 31) // near["k"][0].numel() + 7
    far = {**near, "page_table": near["page_table"] + first}
    for name in "kv":
        cache = near[name]
        far[name] = torch.full((first + len(cache), *cache.shape[1:]), math.nan, dtype=cache.dtype, device="cuda")
        far[name][first:] = cache
    options = {"policy": rule(4), "dense_below": 0, "return_lse": True, "backend": backend}
    assert equal(stem_attention_varlen(**near, **options), stem_attention_varlen(**far, **options))


@pytest.mark.parametrize("view", ["heads first", "sliced out of a fused projection", "expanded heads"])
def test_the_whole_call_copies_no_view(view, rule, backend):
    length = 32768
    if view == "heads first":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in random_qkv(1, length, length, 16, 16, 64))
    elif view == "expanded heads":
        q, k, v = random_qkv(1, length, length, 16, 1, 64)
        k, v = (x.expand(-1, -1, 16, -1) for x in (k, v))
    else:
        fused = random_qkv(1, length, length, 48, 1, 64)[0]
        q, k, v = fused[:, :, :16], fused[:, :, 16:32], fused[:, :, 32:]
    options = {"policy": rule(16), "dense_below": 0, "backend": backend}
    stem_attention(q, k, v, **options)
    result, keys_pooled = length * 16 * 64 * 2, 2 * length * 16 * 64 * 2 * 16 // 128
    with at_most_extra_bytes(result + keys_pooled + 160 * MIB):
        stem_attention(q, k, v, **options)
