"""Ragged batches and paged caches: the numbers of one call for each sequence, as servers ask for them.

Any lengths, page sizes and policies: tests/fuzz/test_fuzz_packed.py. Strides: tests/trust. Wrong arguments: test_bad_input.py.
"""

from itertools import pairwise

import pytest
import torch

import stem_attention as sa
from stem_attention.testing import error_against_sdpa, pack, structured_qkv, token_mask

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


def equal(results, others):
    return all(torch.equal(x, y) for x, y in zip(results, others, strict=True))


@BACKENDS
@ANY_POLICY
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ragged_batches_equal_single_calls_exactly(dtype, policy, backend):
    parts, options = sequences(dtype=dtype), {"policy": policy, "dense_below": 64, "backend": backend}
    out, lse = run(parts, **options)
    assert equal((out, lse), alone(parts, **options))
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    # The torch backend leaves whole rows to torch's own attention, which keeps no log-sum-exp.
    plain = run(parts, return_lse=False, **options)
    assert equal([plain], [torch.cat([sa.stem_attention(*part, **options)[0] for part in parts])])


@BACKENDS
@ANY_POLICY
def test_prompt_lens_and_scale_reach_every_sequence(policy, backend):
    parts = sequences()
    for more in ({"prompt_lens": [high + 90 for _, high in SPANS]}, {"scale": 0.5}):
        options = {"policy": policy, "backend": backend, **more}
        assert equal(run(parts, **options), alone(parts, **options))
    assert equal(run(parts, prompt_lens=[high for _, high in SPANS]), run(parts))
    assert not equal(run(parts, prompt_lens=[900] * len(SPANS)), run(parts))


@BACKENDS
@ANY_POLICY
@pytest.mark.parametrize("page_size", [1, 16, 64, 128, 256])
def test_paged_keys_give_the_bits_of_packed_keys(page_size, policy, backend):
    parts = sequences()
    options = {"policy": policy, "backend": backend, "prompt_lens": [high + 90 for _, high in SPANS]}
    paged = run(parts, page_size, **options)
    assert equal(paged, run(parts, **options))
    assert not paged[0].isnan().any()


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
def test_queries_may_start_anywhere_in_a_block(backend):
    for start in range(33, 65):
        (q, k, v) = sequences([(start, start + 21)], torch.float64)[0]
        out, _ = run([(q, k, v)], backend=backend, prompt_lens=[160])
        mask = token_mask(sa.select_blocks(q, k, v, policy=SMALL, prompt_len=160, backend="reference"))
        assert error_against_sdpa(out[None], q, k, v, mask)[0] < 1e-12, start


def chunks_of(cuts, dtype):
    """A prompt, and its chunks with all keys up to their ends."""
    q, k, v = structured_qkv(1, cuts[-1], cuts[-1], 4, 2, 16, dtype=dtype, seed=5)
    return (q, k, v), [(q[:, low:high], k[:, :high], v[:, :high]) for low, high in pairwise(cuts)]


@BACKENDS
@pytest.mark.parametrize("page_size", [0, 16])
def test_chunks_that_end_on_block_borders_equal_one_shot(page_size, backend):
    whole, chunks = chunks_of((0, 64, 80, 256, 390), torch.float64)
    expected, expected_lse = run([whole], backend=backend)
    # All chunks as one batch: none of them sees another.
    out, lse = run(chunks, page_size, prompt_lens=[390] * len(chunks), backend=backend)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(lse, expected_lse, atol=1e-6, rtol=1e-6)


@BACKENDS
def test_chunks_that_end_anywhere_lose_no_more_than_whole_prompts_do(backend):
    whole, chunks = chunks_of((0, 333, 700, 1001, 1500), torch.float32)
    dense, _ = run([[x.double() for x in whole]], policy="dense")

    def loss(out):
        return float((out.double() - dense).norm() / dense.norm())

    one_shot, _ = run([whole], backend=backend)
    chunked, _ = run(chunks, backend=backend, prompt_lens=[1500] * len(chunks))
    assert 0 < loss(chunked) < 1.2 * loss(one_shot)


@BACKENDS
def test_prompts_under_the_dense_limit_are_dense_beside_longer_ones(backend):
    parts = sequences([(0, 150), (0, 300), (20, 100)])
    policy = sa.Stem(block_size=16, min_blocks=3, sink_blocks=1, local_blocks=1, tail_blocks=0)
    out, lse = run(parts, policy=policy, dense_below=200, backend=backend, prompt_lens=[150, 300, 250])
    dense = [run([part], dense_below=10**9, backend=backend) for part in parts]
    sparse = run([parts[1]], policy=policy, backend=backend)
    assert equal((out[:450], lse[:, :450]), (torch.cat([dense[0][0], sparse[0]]), torch.cat([dense[0][1], sparse[1]], 1)))
    assert not torch.allclose(out[450:], dense[2][0])  # its prompt is long


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
