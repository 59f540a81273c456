"""Ragged batches and paged caches: the numbers of one call for each sequence, as servers ask for them.

Any lengths, page sizes and policies: tests/fuzz. Strides: tests/trust. Wrong arguments: test_bad_input.py.
"""

from itertools import pairwise

import pytest
import torch
from tests.rigs import equal

import stem_attention as sa
from stem_attention.testing import pack, structured_qkv

SMALL = sa.Stem(block_size=16, min_blocks=3, sink_blocks=1, local_blocks=1, tail_blocks=1)
POLICIES = {
    "small": SMALL,
    "factors": sa.Mass(block_size=16, query_pool=4, key_pool=8, tail_blocks=1, share=2.0, head_factors=[[0.2, 1.0, 2.0, 6.0]]),
    "mass": sa.Mass(),
    "extra": sa.Stem.paper(forced="extra", block_size=16),
    "angelslim": sa.Stem.angelslim(block_size=16, stride=8),
}
ANY_POLICY = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
BACKENDS = pytest.mark.parametrize("backend", ["torch", "reference"])
SPANS = [(0, 300), (250, 251), (40, 40), (101, 233), (128, 256), (0, 7), (0, 0)]  # queries of each sequence; keys from 0


def sequences(spans=SPANS, dtype=torch.float32):
    """q, k, v of every sequence alone: queries ``[low, high)`` over keys ``[0, high)``."""
    return [structured_qkv(1, high - low, high, 4, 2, 16, dtype=dtype, seed=i) for i, (low, high) in enumerate(spans)]


def run(parts, page_size=0, **options):
    return sa.stem_attention_varlen(
        **pack(parts, page_size), **{"policy": SMALL, "dense_below": 0, "return_lse": True, **options}
    )


def alone(parts, prompt_lens=None, **options):
    """The results of each sequence in a call of its own, joined."""
    options = {"policy": SMALL, "dense_below": 0, "return_lse": True, **options}
    single = [
        sa.stem_attention(*part, prompt_len=None if prompt_lens is None else prompt_lens[i], **options)
        for i, part in enumerate(parts)
    ]
    return torch.cat([out[0] for out, _ in single]), torch.cat([lse[0] for _, lse in single], 1)


@BACKENDS
@ANY_POLICY
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ragged_batches_equal_single_calls_exactly(dtype, policy, backend):
    parts, options = sequences(dtype=dtype), {"policy": policy, "dense_below": 64, "backend": backend}
    expected = alone(parts, **options)
    assert equal(run(parts, **options), expected)
    assert [x.dtype for x in expected] == [dtype, torch.float32]
    # The torch backend leaves whole rows to torch's own attention, which keeps no log-sum-exp.
    plain = run(parts, return_lse=False, **options)
    assert equal([plain], [torch.cat([sa.stem_attention(*part, **options)[0] for part in parts])])


@BACKENDS
@ANY_POLICY
@pytest.mark.parametrize("page_size", [0, 1, 16, 128])
def test_pages_prompt_lens_and_scale_reach_every_sequence(page_size, policy, backend):
    parts, longer = sequences(), [high + 90 for _, high in SPANS]
    for more in ({"prompt_lens": longer}, {"prompt_lens": longer, "dense_below": 200}, {"scale": 0.5}):
        options = {"policy": policy, "backend": backend, **more}
        assert equal(run(parts, page_size, **options), alone(parts, **options))
    assert equal(run(parts, prompt_lens=[high for _, high in SPANS]), run(parts))
    assert not equal(run(parts, prompt_lens=[900] * len(SPANS)), run(parts))


def test_sequences_may_share_pages():
    q, k, v = structured_qkv(1, 30, 48, 4, 2, 16)
    batch = pack([(q, k, v)] * 2)
    table = torch.arange(3, dtype=torch.int32).expand(2, 3)
    cache = {"k": k.view(3, 16, 2, 16), "v": v.view(3, 16, 2, 16), "page_table": table}
    out = sa.stem_attention_varlen(**{**batch, **cache}, policy=SMALL, dense_below=0)
    assert torch.equal(out[:30], out[30:])
    assert torch.equal(out[:30], sa.stem_attention(q, k, v, policy=SMALL, dense_below=0)[0])


def test_keys_and_values_may_share_a_cache():
    parts = sequences()
    batch = pack(parts, page_size=16)
    fused = torch.cat([batch["k"], batch["v"]], -1).transpose(1, 2).contiguous().transpose(1, 2)  # vLLM's
    caches = {"k": fused[..., :16], "v": fused[..., 16:]}
    assert equal(sa.stem_attention_varlen(**{**batch, **caches}, policy=SMALL, dense_below=0, return_lse=True), run(parts))


@BACKENDS
def test_chunks_that_end_anywhere_lose_no_more_than_whole_prompts_do(backend):
    q, k, v = structured_qkv(1, 1500, 1500, 4, 2, 16, seed=5)
    chunks = [(q[:, low:high], k[:, :high], v[:, :high]) for low, high in pairwise((0, 333, 700, 1001, 1500))]
    dense, _ = run([[x.double() for x in (q, k, v)]], policy="dense")

    def loss(out):
        return float((out.double() - dense).norm() / dense.norm())

    one_shot, _ = run([(q, k, v)], backend=backend)
    chunked, _ = run(chunks, backend=backend, prompt_lens=[1500] * len(chunks))
    assert 0 < loss(chunked) < 1.2 * loss(one_shot)


@BACKENDS
@pytest.mark.parametrize("spans", [[(0, 0)], [(5, 5)], [(0, 0), (0, 40), (0, 0), (9, 9)], [(0, 40), (0, 0)]], ids=str)
def test_empty_sequences_take_no_room(spans, backend):
    parts = sequences(spans)
    total = sum(high - low for low, high in spans)
    for page_size in (0, 16):
        out, lse = run(parts, page_size, backend=backend)
        assert (out.shape, lse.shape) == ((total, 4, 16), (4, total))
        if total:
            assert equal((out, lse), run([part for part in parts if part[0].shape[1]], backend=backend))
