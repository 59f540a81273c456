"""On a GPU: what ``keep="mass"`` keeps, in every layout, against the twin; and that it stays as bounded as the rest."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from stem_attention import StemConfig, select_blocks, stem_attention, stem_attention_varlen
from stem_attention.backends import pieces
from stem_attention.testing import structured_qkv

from .common import assert_accurate, at_most_extra_bytes, borders, differing_rate, no_synchronisation, on_gpu, paged

pytestmark = on_gpu

MASS = StemConfig.mass(dense_below=0)
FACTORS = (0.5, 2.0, 1.0, 4.0, 0.25, 1.5, 1.0, 3.0)
LENGTHS = [(300, 300), (1, 4097), (0, 900), (2500, 2500), (1300, 3011), (128, 128), (7, 7)]


@pytest.fixture(params=[None, FACTORS], ids=["one-share", "factors"])
def mass(request):
    """Makes the config for a number of query heads."""
    return lambda heads: MASS if request.param is None else replace(MASS, head_factors=(request.param[:heads],))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("config", "q_len", "kv_len", "heads", "dim", "prompt_len"),
    [
        (MASS, 8192, 8192, (8, 2), 128, 8192),
        (MASS, 3001, 7013, (4, 4), 64, 9000),
        (replace(MASS, share=2.0), 4097, 4097, (7, 1), 80, 4097),
        (replace(MASS, query_pool=8, key_pool=64), 4096, 4096, (4, 2), 256, 4096),
        (replace(MASS, block_size=128, query_pool=64, key_pool=16), 4999, 4999, (4, 1), 96, 4999),
        (replace(MASS, tail_blocks=0, sink_blocks=0), 2000, 2000, (2, 2), 128, 2000),
        (replace(MASS, head_factors=(FACTORS,)), 3001, 7013, (8, 2), 128, 9000),
    ],
)
def test_it_keeps_what_the_twin_keeps(config, q_len, kv_len, heads, dim, prompt_len, dtype, backend):
    if config.block_size == 128 and dim == 96 and backend == "hopper":
        pytest.skip("head_dim 96 is not of the Hopper kernel")
    if dim == 80 and backend == "hopper":
        pytest.skip("head_dim 80 is not of the Hopper kernel")
    q, k, v = structured_qkv(1, q_len, kv_len, *heads, dim, dtype, "cuda")
    got = select_blocks(q, k, v, config=config, prompt_len=prompt_len, backend=backend)
    got.validate()
    expected = select_blocks(q.cpu(), k.cpu(), v.cpu(), config=config, prompt_len=prompt_len, backend="torch")
    here = type(got)(got.indices.cpu(), got.counts.cpu(), got.block_size, got.q_len, got.kv_len)
    assert differing_rate(here, expected) <= 1e-3
    assert got.density() < 1
    out, lse = stem_attention(q, k, v, config=config, prompt_len=prompt_len, return_lse=True, backend=backend)
    assert_accurate(out, lse, q, k, v, got)


@pytest.mark.parametrize("page", [0, 1, 16, 64, 128])
def test_each_sequence_is_as_if_alone(page, mass, backend):
    config = mass(4)
    single = [structured_qkv(1, a, b, 4, 2, 128, torch.bfloat16, "cuda", seed=i) for i, (a, b) in enumerate(LENGTHS)]
    q, k, v = (torch.cat(x, 1)[0] for x in zip(*single, strict=True))
    cu_q, cu_k = (borders(list(x)) for x in zip(*LENGTHS, strict=True))
    table = None
    if page:
        (k, table), (v, _) = paged(k, cu_k, page), paged(v, cu_k, page)
    out = stem_attention_varlen(q, k, v, cu_q, cu_k, 2500, 4097, page_table=table, config=config, backend=backend)
    own = "triton" if page % 64 else backend  # other pages go to the portable kernel, whose bits are its own
    for i, (low, high) in enumerate(pairwise(cu_q.tolist())):
        if low < high:
            alone = stem_attention(*single[i], config=config, backend=own)
            torch.testing.assert_close(out[low:high], alone[0], atol=4e-3, rtol=2e-2)


def test_a_call_that_is_cut_gives_the_bits_of_one_that_is_not(mass, backend, monkeypatch):
    config = mass(4)
    q, k, v = structured_qkv(1, 5000, 6000, 4, 2, 128, torch.bfloat16, "cuda")
    whole, norm = stem_attention(q, k, v, config=config, return_lse=True, backend=backend)
    monkeypatch.setattr(pieces, "LIST_BYTES", 4 * 4 * 94 * 20)
    cut, cut_norm = stem_attention(q, k, v, config=config, return_lse=True, backend=backend)
    assert torch.equal(whole, cut)
    assert torch.equal(norm, cut_norm)


def test_the_host_never_waits_and_a_graph_can_be_replayed(mass, backend):
    config = mass(8)
    first, second = (structured_qkv(1, 4096, 4096, 8, 2, 128, torch.bfloat16, "cuda", seed=seed) for seed in (0, 1))
    expected = stem_attention(*second, config=config, backend=backend)
    still = [x.clone() for x in first]
    stem_attention(*still, config=config, backend=backend)
    with no_synchronisation():
        stem_attention(*still, config=config, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = stem_attention(*still, config=config, backend=backend)
    for x, new in zip(still, second, strict=True):
        x.copy_(new)
    graph.replay()
    assert torch.equal(out, expected)


def test_bits_are_the_same_every_time(mass, backend):
    config = mass(8)
    q, k, v = structured_qkv(1, 8192, 8192, 8, 2, 128, torch.bfloat16, "cuda")
    first = stem_attention(q, k, v, config=config, backend=backend)
    for _ in range(20):
        assert torch.equal(stem_attention(q, k, v, config=config, backend=backend), first)


def test_room_for_lists_is_bounded(mass, backend):
    config = mass(8)
    q, k, v = structured_qkv(1, 262144, 262144, 8, 2, 64, torch.bfloat16, "cuda")
    out_bytes = q.numel() * 2
    with at_most_extra_bytes(2 * out_bytes + pieces.LIST_BYTES + (256 << 20)):
        stem_attention(q, k, v, config=config, backend=backend)
