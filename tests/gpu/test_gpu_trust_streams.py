"""On a GPU: tables that the host sends along are right on every stream, in every graph, and whatever is freed meanwhile."""

from dataclasses import replace

import pytest
import torch
from tests.rigs import equal

from stem_attention import Policy, Stem, select_blocks, stem_attention, stem_attention_varlen
from stem_attention.testing import borders

from .common import RULES, captured, on_gpu, random_qkv

pytestmark = on_gpu

BUSY = 1_000_000_000  # cycles: half a second in which a stream does nothing else, more than a loaded host needs for a call
KNOWN = {"budgets": Stem(ratio_long=0.2), "factors": RULES["factors"](8)}


def fresh(known: Policy, n: int) -> Policy:
    """The blocks of a policy under one that no other call has used: its tables are not on the device yet."""
    if isinstance(known, Stem):  # with one ratio for all lengths no knee matters
        return replace(known, knee_tokens=known.knee_tokens + n)
    return replace(known, share=known.share * (1 + n * 1e-12))  # the same number in fp32


def attend(q, k, v, policy, backend, **options):
    return stem_attention(q, k, v, policy=policy, dense_below=0, backend=backend, **options)


@pytest.fixture(params=KNOWN)
def known(request):
    """A policy whose kernels are compiled and loaded before anything is timed against anything."""
    q, k, v = random_qkv(1, 5000, 5000, 8, 2, 128)
    for backend_name in ("auto", "triton"):
        attend(q, k, v, KNOWN[request.param], backend_name)
    torch.cuda.synchronize()
    return KNOWN[request.param]


def test_a_second_stream_does_not_read_budgets_that_are_still_on_their_way(known, backend):
    q, k, v = random_qkv(1, 5000, 5000, 8, 2, 128)
    expected, kept = attend(q, k, v, known, backend), select_blocks(q, k, v, policy=known, backend=backend)
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    policy = fresh(known, 1 if backend == "hopper" else 2)
    with torch.cuda.stream(first):
        torch.cuda._sleep(BUSY)  # the copy waits behind this
        early = attend(q, k, v, policy, backend)
    with torch.cuda.stream(second):
        out, selection = attend(q, k, v, policy, backend), select_blocks(q, k, v, policy=policy, backend=backend)
    second.synchronize()
    assert not first.query()  # or this example shows nothing
    assert torch.equal(out, expected)
    assert torch.equal(selection.indices, kept.indices)
    first.synchronize()
    assert torch.equal(early, expected)


def scribble(known):
    """Give back what is cached on the host and on the device, and write over it."""
    for i in range(300):  # more policies than tables are kept for
        q, k, v = random_qkv(1, 2048 + i % 80 * 128, 2048 + i % 80 * 128, 8, 2, 128)
        attend(q, k, v, fresh(known, 500 + i), "auto")
    torch.cuda.synchronize()
    for size in (256, 1024, 4096, 16384):
        for _ in range(200):
            torch.full((size // 4,), 0x7FFFFFFF, dtype=torch.int32, device="cuda")
            torch.full((size // 4,), 0x7FFFFFFF, dtype=torch.int32).pin_memory()


def test_calls_beside_a_captured_graph_do_not_read_what_its_replay_writes(known, backend):
    """A graph's own copy of the budgets runs at replay: nobody else may count on it."""
    q, k, v = random_qkv(1, 5000, 5000, 8, 2, 128)
    expected = attend(q, k, v, known, backend)
    policy = fresh(known, 3 if backend == "hopper" else 4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # of a policy that was never seen: its budgets are copied in the graph
        inside = attend(q, k, v, policy, backend)
    assert torch.equal(attend(q, k, v, policy, backend), expected)
    graph.replay()
    assert torch.equal(inside, expected)


@pytest.mark.parametrize("packed", [False, True])
def test_a_graph_replays_after_everything_else_is_forgotten(packed, known, backend):
    held = random_qkv(1, 5000, 5000, 8, 2, 128)
    starts = borders([3000, 1, 500, 1499])

    def run():
        options = {"policy": known, "dense_below": 0, "return_lse": True, "backend": backend}
        if packed:
            return stem_attention_varlen(*(x[0] for x in held), starts, starts, 3000, 3000, **options)
        return stem_attention(*held, **options)

    expected = run()
    graph, results = captured(run)
    scribble(known)
    for _ in range(3):
        for x in results:
            x.zero_()
        graph.replay()
        assert equal(results, expected)
    for x in held:
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert equal(results, run())


def test_lengths_that_differ_compile_nothing_new(known, backend):
    from stem_attention.backends.hopper.kernel import attention_kernel as hopper_kernel
    from stem_attention.backends.hopper.pair_kernel import pair_kernel
    from stem_attention.backends.triton import attention_kernel, mass_kernels, stem_kernels

    kernels = [
        hopper_kernel, pair_kernel, attention_kernel.attention_kernel, stem_kernels.choose_kernel, stem_kernels.score_kernel,
        stem_kernels.pool_keys, stem_kernels.pool_queries, mass_kernels.pool_kernel, mass_kernels.keep_kernel,
    ]  # fmt: skip

    def compiled():
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    def run(length):
        q, k, v = random_qkv(1, length, length, 8, 2, 128)
        attend(q, k, v, known, backend)
        attend(q[:, : length // 2], k, v, known, backend, return_lse=True)

    run(6000)
    before = compiled()
    for length in (5999, 6016, 6144, 7001, 7680, 8192, 5000, 4097):  # 33 to 64 blocks
        run(length)
    assert compiled() == before
