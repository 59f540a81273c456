"""On a GPU: what the calls cost the host and the memory, and how they live with graphs, streams and the compiler."""

import pytest
import torch

from stem_attention import block_sparse_attention, select_blocks, stem_attention
from stem_attention.backends.reference import ReferenceBackend
from stem_attention.testing import make_qkv, random_selection, relative_error

from .common import GIB, MIB, SPARSE, at_most_extra_bytes, free_memory, no_synchronisation, on_gpu, random_qkv

pytestmark = [*on_gpu, pytest.mark.usefixtures("_return_memory")]


@pytest.mark.parametrize("return_lse", [False, True])
def test_the_host_never_waits(return_lse, backend):
    q, k, v = random_qkv(1, 8000, 8000, 8, 2, 128)
    first = stem_attention(q, k, v, config=SPARSE, return_lse=return_lse, backend=backend)
    with no_synchronisation():
        again = stem_attention(q, k, v, config=SPARSE, return_lse=return_lse, backend=backend)
        selection = select_blocks(q, k, v, config=SPARSE)
        apart = block_sparse_attention(q, k, v, selection, return_lse=return_lse, backend=backend)
    for results in (again, apart):
        pairs = zip(first, results, strict=True) if return_lse else [(first, results)]
        assert all(torch.equal(a, b) for a, b in pairs)


def test_the_host_never_waits_at_a_length_it_has_not_seen():
    q, k, v = random_qkv(1, 8000, 8000, 8, 2, 128)
    stem_attention(q, k, v, config=SPARSE)
    with no_synchronisation():
        stem_attention(q[:, :7123], k[:, :7123], v[:, :7123], config=SPARSE)


@pytest.mark.parametrize("length", [4096, 6007])
def test_a_graph_replays_with_new_data(length, backend):
    held = random_qkv(1, length, length, 8, 2, 128)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        stem_attention(*held, config=SPARSE, return_lse=True, backend=backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = stem_attention(*held, config=SPARSE, return_lse=True, backend=backend)
    for seed in (5, 6):
        fresh = random_qkv(1, length, length, 8, 2, 128, seed=seed)
        for old, new in zip(held, fresh, strict=True):
            old.copy_(new)
        graph.replay()
        expected, expected_lse = stem_attention(*fresh, config=SPARSE, return_lse=True, backend=backend)
        assert torch.equal(out, expected)
        assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_compiler_takes_the_calls_in_one_graph(dynamic, backend):
    def layer(q, k, v):
        selection = select_blocks(q, k, v, config=SPARSE)
        return stem_attention(q * 1.5, k, v, config=SPARSE, backend=backend) + block_sparse_attention(
            q, k, v, selection, backend=backend
        )

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for length in (3000, 2500):
        q, k, v = random_qkv(1, length, length, 4, 2, 64)
        assert relative_error(compiled(q, k, v), layer(q, k, v)) < 4e-3


def test_twenty_runs_give_the_same_bits(backend):
    q, k, v = random_qkv(2, 9000, 12000, 8, 2, 128)
    first = stem_attention(q, k, v, config=SPARSE, return_lse=True, backend=backend)
    chosen = select_blocks(q, k, v)
    for _ in range(20):
        again = stem_attention(q, k, v, config=SPARSE, return_lse=True, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert torch.equal(select_blocks(q, k, v).indices, chosen.indices)


def test_another_stream(backend):
    q, k, v = random_qkv(1, 6000, 6000, 8, 2, 128)
    expected = stem_attention(q, k, v, config=SPARSE, backend=backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # work that stays on the other stream would be done before this ends
        copies = [x.clone() for x in (q, k, v)]
        out = stem_attention(*copies, config=SPARSE, backend=backend)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_a_device_that_is_not_the_current_one(backend):
    q, k, v = random_qkv(1, 3000, 3000, 4, 2, 128)
    expected = stem_attention(q, k, v, config=SPARSE, backend=backend)
    out = stem_attention(*(x.to("cuda:1") for x in (q, k, v)), config=SPARSE, backend=backend)
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
    selection = select_blocks(q, k, v)
    lists = selection.indices.numel() * 4 + selection.counts.numel() * 4
    del selection
    with at_most_extra_bytes(lists + 256 * MIB):
        select_blocks(q, k, v)


@pytest.mark.skipif(free_memory() < 14 * GIB, reason="needs 14 GiB of free GPU memory")
def test_offsets_beyond_2_to_the_31(backend):
    tokens, stride = 4096, 1 << 20
    store = torch.zeros(tokens * stride, dtype=torch.bfloat16, device="cuda")
    shape = {"q": 4, "k": 2, "v": 2}
    small = dict(zip(shape, random_qkv(1, tokens, tokens, 4, 2, 128), strict=True))
    far = {}
    for i, (name, heads) in enumerate(shape.items()):
        far[name] = store.as_strided((1, tokens, heads, 128), (tokens * stride, stride, 128, 1), i * 1024)
        far[name].copy_(small[name])
    assert (tokens - 1) * stride > 2**31
    out, lse = stem_attention(**far, config=SPARSE, return_lse=True, backend=backend)
    expected, expected_lse = stem_attention(**small, config=SPARSE, return_lse=True, backend=backend)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


@pytest.mark.skipif(free_memory() < 30 * GIB, reason="needs 30 GiB of free GPU memory")
def test_a_million_tokens():
    length = 1 << 20
    q, k, v = random_qkv(1, length, length, 32, 8, 128)
    with at_most_extra_bytes(q.numel() * q.element_size() + 3 * GIB // 2):
        out = stem_attention(q, k, v, config=SPARSE)
    assert out.numel() > 2**31
    for low in (0, 5_000 * 128, length - 3 * 128):
        high = low + 128
        chunk = (q[:, low:high], k[:, :high], v[:, :high])
        selection = select_blocks(*chunk, config=SPARSE, prompt_len=length)
        expected, _ = ReferenceBackend().attend(*chunk, selection, 128**-0.5)
        assert relative_error(out[:, low:high], expected) < 5e-3
