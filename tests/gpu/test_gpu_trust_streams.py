"""On a GPU: tables that the host sends along are right on every stream, in every graph, and whatever is freed meanwhile."""

import threading
from dataclasses import replace

import pytest
import torch

from stem_attention import StemConfig, select_blocks, stem_attention, stem_attention_varlen
from stem_attention.testing.packed import borders

from .common import SPARSE, on_gpu, random_qkv

pytestmark = on_gpu

BUSY = 100_000_000  # cycles: some 50 ms in which a stream does nothing else
FACTORS = StemConfig.mass(dense_below=0, head_factors=[[0.5, 2, 1, 4, 0.25, 1.5, 1, 3]])


def fresh(known: StemConfig, n: int) -> StemConfig:
    """The blocks of a config under one that no other call has used: its tables are not on the device yet."""
    return replace(known, dense_layers=n)  # of which a single call knows nothing


@pytest.fixture(params=[SPARSE, FACTORS], ids=["budgets", "factors"])
def known(request):
    """A config whose kernels are compiled and loaded before anything is timed against anything."""
    q, k, v = random_qkv(1, 5000, 5000, 8, 2, 128)
    for backend_name in ("auto", "triton"):
        stem_attention(q, k, v, config=request.param, backend=backend_name)
    torch.cuda.synchronize()
    return request.param


def test_a_second_stream_does_not_read_budgets_that_are_still_on_their_way(known, backend):
    q, k, v = random_qkv(1, 5000, 5000, 8, 2, 128)
    expected = stem_attention(q, k, v, config=known, backend=backend)
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    config = fresh(known, 1 if backend == "hopper" else 2)
    with torch.cuda.stream(first):
        torch.cuda._sleep(BUSY)  # the copy waits behind this
        early = stem_attention(q, k, v, config=config, backend=backend)
    with torch.cuda.stream(second):
        out = stem_attention(q, k, v, config=config, backend=backend)
    second.synchronize()
    assert not first.query()  # or this example shows nothing
    assert torch.equal(out, expected)
    first.synchronize()
    assert torch.equal(early, expected)


def captured(function, *warm):
    """A graph of a call, warmed up on a side stream as torch asks, and its result."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function(*warm)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function(*warm)
    return graph, result


def scribble(known):
    """Give back what is cached on the host and on the device, and write over it."""
    for i in range(300):  # more configs than tables are kept for
        q, k, v = random_qkv(1, 2048 + i % 80 * 128, 2048 + i % 80 * 128, 8, 2, 128)
        stem_attention(q, k, v, config=fresh(known, 500 + i))
    torch.cuda.synchronize()
    for size in (256, 1024, 4096, 16384):
        for _ in range(200):
            torch.full((size // 4,), 0x7FFFFFFF, dtype=torch.int32, device="cuda")
            torch.full((size // 4,), 0x7FFFFFFF, dtype=torch.int32).pin_memory()


def test_calls_beside_a_captured_graph_do_not_read_what_its_replay_writes(known, backend):
    """A graph's own copy of the budgets runs at replay: nobody else may count on it."""
    q, k, v = random_qkv(1, 5000, 5000, 8, 2, 128)
    expected = stem_attention(q, k, v, config=known, backend=backend)
    config = fresh(known, 3 if backend == "hopper" else 4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # at a config that was never seen: its budgets are copied in the graph
        inside = stem_attention(q, k, v, config=config, backend=backend)
    assert torch.equal(stem_attention(q, k, v, config=config, backend=backend), expected)
    graph.replay()
    assert torch.equal(inside, expected)


def test_a_graph_replays_after_everything_else_is_forgotten(known, backend):
    q, k, v = random_qkv(1, 5000, 5000, 8, 2, 128)
    expected = stem_attention(q, k, v, config=known, backend=backend)
    graph, out = captured(lambda *x: stem_attention(*x, config=known, backend=backend), q, k, v)
    scribble(known)
    for _ in range(3):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)


def test_a_packed_batch_in_a_graph(known, backend):
    lengths = [3000, 1, 500, 1499]
    q, k, v = (x[0] for x in random_qkv(1, 5000, 5000, 8, 2, 128))
    starts = borders(lengths)

    def run(q, k, v):
        return stem_attention_varlen(q, k, v, starts, starts, 3000, 3000, config=known, backend=backend)

    expected = run(q, k, v)
    graph, out = captured(run, q, k, v)
    scribble(known)
    for _ in range(3):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)
    fresh_q = torch.randn_like(q)
    q.copy_(fresh_q)
    graph.replay()
    assert torch.equal(out, run(fresh_q, k, v))


def test_many_streams_give_the_same_bits(known, backend):
    q, k, v = random_qkv(1, 5000, 5000, 8, 2, 128)
    expected = stem_attention(q, k, v, config=known, return_lse=True, backend=backend)
    torch.cuda.synchronize()
    results = []
    for _ in range(12):
        with torch.cuda.stream(torch.cuda.Stream()):
            results.append(stem_attention(q, k, v, config=known, return_lse=True, backend=backend))
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for result in results for x, y in zip(result, expected, strict=True))


def test_lengths_that_differ_compile_nothing_new(known, backend):
    from stem_attention.backends.hopper.kernel import attention_kernel as hopper_kernel
    from stem_attention.backends.triton import attention_kernel, choose_kernel, mass_kernels, pool_kernels, score_kernel

    kernels = [
        hopper_kernel, attention_kernel.attention_kernel, choose_kernel.choose_kernel, score_kernel.score_kernel,
        pool_kernels.pool_keys, pool_kernels.pool_queries, mass_kernels.pool_key_means, mass_kernels.pool_query_means,
        mass_kernels.keep_kernel,
    ]  # fmt: skip

    def compiled():
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    def run(length):
        q, k, v = random_qkv(1, length, length, 8, 2, 128)
        stem_attention(q, k, v, config=known, backend=backend)
        stem_attention(q[:, : length // 2], k, v, config=known, return_lse=True, backend=backend)

    run(6000)
    before = compiled()
    for length in (5999, 6016, 6144, 7001, 7680, 8192, 5000, 4097):  # 33 to 64 blocks
        run(length)
    assert compiled() == before


def test_threads_do_not_disturb_one_another(known, backend):
    inputs = [random_qkv(1, 3000 + 128 * i, 3000 + 128 * i, 8, 2, 128, seed=i) for i in range(4)]
    expected = [stem_attention(*x, config=known, backend=backend) for x in inputs]
    torch.cuda.synchronize()
    wrong = []

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            for n in range(20):
                out = stem_attention(*inputs[i], config=fresh(known, 1000 + n), backend=backend)
                if not torch.equal(out, expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_selections_on_two_streams_keep_the_same_blocks(known):
    q, k, v = random_qkv(1, 9000, 9000, 8, 2, 128)
    expected = select_blocks(q, k, v, config=known)
    torch.cuda.synchronize()
    config, streams = fresh(known, 5), [torch.cuda.Stream() for _ in range(4)]
    results = []
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(BUSY // 10)
            results.append(select_blocks(q, k, v, config=config))
    torch.cuda.synchronize()
    assert all(torch.equal(x.indices, expected.indices) for x in results)
