"""On a GPU: packed batches, their keys packed too or in a paged cache."""

from itertools import pairwise

import pytest
import torch

from stem_attention import StemConfig, stem_attention, stem_attention_varlen
from stem_attention.testing import structured_qkv

from .common import SPARSE, borders, no_synchronisation, on_gpu, paged

pytestmark = on_gpu

LENGTHS = [(300, 300), (1, 4097), (0, 900), (2500, 2500), (1300, 3011), (128, 128), (7, 7)]
PRESETS = {
    "default": SPARSE,
    "dense-below": StemConfig(dense_below=1000),
    "paper-64": StemConfig.paper(dense_below=0, block_size=64),
    "extra": StemConfig.paper(dense_below=0, forced="extra"),
    "angelslim": StemConfig.angelslim(dense_below=0),
}


def batch(dim=128, heads=(4, 2), dtype=torch.bfloat16):
    """The sequences one by one, packed, and their borders."""
    single = [structured_qkv(1, a, b, *heads, dim, dtype, "cuda", seed=i) for i, (a, b) in enumerate(LENGTHS)]
    packed = tuple(torch.cat(x, 1)[0] for x in zip(*single, strict=True))
    return single, packed, *(borders(list(x)) for x in zip(*LENGTHS, strict=True))


def runs_on(backend, page, config=SPARSE):
    """Pages that the Hopper kernel does not take go to the portable one, whose bits are its own.

    Under the z-score each sequence is gathered and runs alone, so that pages do not matter.
    """
    return "triton" if page % 64 and config.magnitude != "zscore" else backend


def assert_each_as_alone(out, lse, single, cu_q, config, prompt_lens=None, *, backend):
    for i, (low, high) in enumerate(pairwise(cu_q.tolist())):
        if low == high:
            continue
        prompt_len = None if prompt_lens is None else prompt_lens[i]
        alone, norm = stem_attention(*single[i], config=config, return_lse=True, prompt_len=prompt_len, backend=backend)
        torch.testing.assert_close(out[low:high], alone[0], atol=4e-3, rtol=2e-2)
        torch.testing.assert_close(lse[:, low:high], norm[0], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("page", [0, 1, 16, 64, 128, 256])
def test_each_sequence_is_as_if_alone(page, preset, backend):
    single, (q, k, v), cu_q, cu_k = batch()
    table = None
    if page:
        (k, table), (v, _) = paged(k, cu_k, page), paged(v, cu_k, page)
    out, lse = stem_attention_varlen(
        q, k, v, cu_q, cu_k, 2500, 4097, page_table=table, config=PRESETS[preset], return_lse=True, backend=backend
    )
    assert_each_as_alone(out, lse, single, cu_q, PRESETS[preset], backend=runs_on(backend, page, PRESETS[preset]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("dim", "heads"), [(64, (8, 1)), (80, (7, 1)), (256, (4, 4))])
@pytest.mark.parametrize("page", [0, 16, 64])
def test_every_head_dim_and_group(page, dim, heads, dtype, backend):
    single, (q, k, v), cu_q, cu_k = batch(dim, heads, dtype)
    table = None
    if page:
        (k, table), (v, _) = paged(k, cu_k, page), paged(v, cu_k, page)
    out, lse = stem_attention_varlen(
        q, k, v, cu_q, cu_k, 2500, 4097, page_table=table, config=SPARSE, return_lse=True, backend=backend
    )
    assert_each_as_alone(out, lse, single, cu_q, SPARSE, backend=runs_on(backend, page))


@pytest.mark.parametrize("config", [SPARSE, PRESETS["extra"]], ids=["inside", "extra"])
def test_prompts_that_are_still_to_come(config, backend):
    single, (q, k, v), cu_q, cu_k = batch()
    prompts = [b + 3000 for _, b in LENGTHS]
    out, lse = stem_attention_varlen(
        q, k, v, cu_q, cu_k, 2500, 4097, prompt_lens=prompts, config=config, return_lse=True, backend=backend
    )
    assert_each_as_alone(out, lse, single, cu_q, config, prompts, backend=backend)


def test_borders_may_lie_on_the_device():
    _, (q, k, v), cu_q, cu_k = batch()
    here = stem_attention_varlen(q, k, v, cu_q, cu_k, 2500, 4097, config=SPARSE)
    assert torch.equal(stem_attention_varlen(q, k, v, cu_q.cuda(), cu_k.cuda(), 2500, 4097, config=SPARSE), here)


@pytest.mark.parametrize("page", [0, 16])
def test_the_host_never_waits(page, backend):
    _, (q, k, v), cu_q, cu_k = batch()
    table = None
    if page:
        (k, table), (v, _) = paged(k, cu_k, page), paged(v, cu_k, page)

    def run():
        return stem_attention_varlen(q, k, v, cu_q, cu_k, 2500, 4097, page_table=table, config=SPARSE, backend=backend)

    first = run()
    with no_synchronisation():
        again = run()
    assert torch.equal(again, first)


def test_a_page_of_the_table_that_does_not_exist_reads_nothing_outside(backend):
    _, (q, k, v), cu_q, cu_k = batch()
    (k, table), (v, _) = paged(k, cu_k, 64), paged(v, cu_k, 64)
    for wild in (1 << 30, -(1 << 30)):
        stem_attention_varlen(
            q, k, v, cu_q, cu_k, 2500, 4097, page_table=torch.full_like(table, wild), config=SPARSE, backend=backend
        )
    torch.cuda.synchronize()  # an access outside would have ended the context


def packed_alone(single, **options):
    """One sequence as a batch of its own: out and lse."""
    q, k, v = (x[0] for x in single)
    lengths = [len(q)], [len(k)]
    return stem_attention_varlen(q, k, v, *map(borders, lengths), len(q), len(k), return_lse=True, **options)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_composition_of_a_batch_never_changes_a_bit(preset, backend):
    single, *_ = batch()
    options = {"config": PRESETS[preset], "backend": backend}
    alone = [packed_alone(part, **options) for part in single]
    for order in ([6, 5, 4, 3, 2, 1, 0], [4, 1], [1, 3, 1]):
        q, k, v = (torch.cat([single[i][part][0] for i in order]) for part in range(3))
        lengths = ([single[i][part].shape[1] for i in order] for part in range(2))
        out, lse = stem_attention_varlen(q, k, v, *map(borders, lengths), 2500, 4097, return_lse=True, **options)
        assert torch.equal(out, torch.cat([alone[i][0] for i in order]))
        assert torch.equal(lse, torch.cat([alone[i][1] for i in order], 1))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("page", [1, 16, 64, 128, 256])
def test_paged_keys_give_the_bits_of_packed_keys_in_the_same_kernel(page, preset, backend):
    _, (q, k, v), cu_q, cu_k = batch()
    options = {"config": PRESETS[preset], "return_lse": True}
    own = runs_on(backend, page, PRESETS[preset])
    packed = stem_attention_varlen(q, k, v, cu_q, cu_k, 2500, 4097, backend=own, **options)
    (k, table), (v, _) = paged(k, cu_k, page), paged(v, cu_k, page)
    found = stem_attention_varlen(q, k, v, cu_q, cu_k, 2500, 4097, page_table=table, backend=backend, **options)
    assert all(torch.equal(x, y) for x, y in zip(found, packed, strict=True))


@pytest.mark.parametrize("page", [0, 1, 16, 64])
def test_chunks_on_block_borders_equal_one_shot(page, backend):
    length, cuts = 5000, (0, 1024, 1152, 3072, 5000)
    q, k, v = structured_qkv(1, length, length, 4, 2, 128, torch.bfloat16, "cuda")
    expected, expected_lse = stem_attention(q, k, v, config=SPARSE, return_lse=True, backend=runs_on(backend, page or 64))
    ends = list(cuts[1:])
    keys, values = (torch.cat([x[0, :end] for end in ends]) for x in (k, v))
    cu_q, cu_k, table = borders([high - low for low, high in pairwise(cuts)]), borders(ends), None
    if page:
        (keys, table), (values, _) = paged(keys, cu_k, page), paged(values, cu_k, page)
    out, lse = stem_attention_varlen(
        q[0], keys, values, cu_q, cu_k, 1928, length, page_table=table, prompt_lens=[length] * 4, config=SPARSE,
        return_lse=True, backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(out, expected[0], atol=4e-3, rtol=2e-2)
    torch.testing.assert_close(lse, expected_lse[0], atol=1e-3, rtol=1e-4)


def test_a_pool_of_slots_and_vllms_cache_are_read_in_place(backend):
    _, (q, k, v), cu_q, cu_k = batch()
    options = {"config": SPARSE, "backend": backend}
    (pool_k, slots), (pool_v, _) = paged(k, cu_k, 1), paged(v, cu_k, 1)
    expected = stem_attention_varlen(q, k, v, cu_q, cu_k, 2500, 4097, config=SPARSE, backend="triton")
    pools = (x[:, 0].unsqueeze(1) for x in (pool_k, pool_v))  # SGLang: (slots, heads, dim)
    assert torch.equal(stem_attention_varlen(q, *pools, cu_q, cu_k, 2500, 4097, page_table=slots, **options), expected)
    (cache_k, table), (cache_v, _) = paged(k, cu_k, 16), paged(v, cu_k, 16)
    fused = torch.cat([cache_k, cache_v], -1).transpose(1, 2).contiguous().transpose(1, 2)  # vLLM: heads first, k beside v
    halves = torch.split(fused, 128, -1)
    assert torch.equal(stem_attention_varlen(q, *halves, cu_q, cu_k, 2500, 4097, page_table=table, **options), expected)
