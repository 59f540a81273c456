"""What servers ask of ragged batches: paged caches of any page size, chunked prefill, and neighbours that change nothing."""

from itertools import pairwise

import pytest
import torch

import stem_attention as sa
from stem_attention.policies.budget import row_budgets
from stem_attention.testing import error_against_sdpa, structured_qkv, token_mask

BACKENDS = ("torch", "reference")
SMALL = sa.StemConfig(block_size=16, min_blocks=3, sink_blocks=1, local_blocks=1, tail_blocks=1, dense_below=0)
CONFIGS = {
    "small blocks": SMALL,
    "default": sa.StemConfig(dense_below=0),
    "extra": sa.StemConfig.paper(dense_below=0, forced="extra", block_size=16),
    "angelslim": sa.StemConfig.angelslim(dense_below=0, block_size=16, stride=8),
}
SPANS = [(0, 300), (250, 251), (40, 40), (101, 233), (128, 256), (0, 7), (0, 0)]  # queries of each sequence; keys from 0


def sequences(spans=SPANS, dtype=torch.float32):
    """q, k, v of every sequence alone: queries ``[low, high)`` over keys ``[0, high)``."""
    return [structured_qkv(1, high - low, high, 4, 2, 16, dtype=dtype, seed=i) for i, (low, high) in enumerate(spans)]


def packed(parts):
    """The arguments of a batch of sequences with packed keys."""
    q, k, v = (torch.cat([part[i][0] for part in parts]) for i in range(3))
    borders = [torch.tensor([0, *(part[i].shape[1] for part in parts)]).cumsum(0).to(torch.int32) for i in (0, 1)]
    return q, k, v, *borders, *(int(x.diff().max()) for x in borders)


def to_pages(parts, page_size, seed=0):
    """k and v of all sequences in scrambled pages, NaN where no key lies, and their table."""
    needed = [-(-part[1].shape[1] // page_size) for part in parts]
    order = torch.randperm(sum(needed) + 2, generator=torch.Generator().manual_seed(seed)).to(torch.int32)
    table = torch.full((len(parts), max(needed) + 1), -7, dtype=torch.int32)
    caches = [torch.full((len(order), page_size, *parts[0][1].shape[2:]), torch.nan, dtype=parts[0][1].dtype) for _ in "kv"]
    for i, pages in enumerate(torch.split(order[: sum(needed)], needed)):
        table[i, : len(pages)] = pages
        for cache, x in zip(caches, parts[i][1:], strict=True):
            for page, run in zip(pages.tolist(), torch.split(x[0], page_size), strict=False):
                cache[page, : len(run)] = run
    return (*caches, table)


def run(parts, **options):
    return sa.stem_attention_varlen(*packed(parts), return_lse=True, **options)


def equal(results, others):
    return all(torch.equal(x, y) for x, y in zip(results, others, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("page_size", [1, 16, 64, 128, 256])
def test_paged_keys_give_the_bits_of_packed_keys(page_size, config, backend):
    parts = sequences()
    q, _, _, *borders = packed(parts)
    k, v, table = to_pages(parts, page_size)
    options = {"config": CONFIGS[config], "backend": backend, "prompt_lens": [high + 90 for _, high in SPANS]}
    paged = sa.stem_attention_varlen(q, k, v, *borders, page_table=table, return_lse=True, **options)
    assert equal(paged, run(parts, **options))
    assert not paged[0].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_pool_of_slots_is_a_cache_with_pages_of_one_token(dtype):
    parts = sequences(dtype=dtype)
    q, _, _, *borders = packed(parts)
    k, v, slots = to_pages(parts, 1)
    pools = [x[:, 0].unsqueeze(1) for x in (k, v)]  # SGLang's (slots, heads, dim)
    assert all(pool.data_ptr() == x.data_ptr() for pool, x in zip(pools, (k, v), strict=True))
    assert equal(
        sa.stem_attention_varlen(q, *pools, *borders, page_table=slots, config=SMALL, return_lse=True), run(parts, config=SMALL)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", CONFIGS)
def test_the_composition_of_a_batch_never_changes_a_row(config, backend):
    options = {"config": CONFIGS[config], "backend": backend}
    parts = sequences()
    alone = [run([part], **options) for part in parts]
    for order in ([6, 5, 4, 3, 2, 1, 0], [3, 0], [1, 3, 1], [2, 4, 0, 5]):
        out, lse = run([parts[i] for i in order], **options)
        assert torch.equal(out, torch.cat([alone[i][0] for i in order]))
        assert torch.equal(lse, torch.cat([alone[i][1] for i in order], 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_may_start_anywhere_in_a_block(backend):
    for start in range(33, 65):
        (q, k, v) = sequences([(start, start + 21)], torch.float64)[0]
        out, _ = run([(q, k, v)], config=SMALL, backend=backend, prompt_lens=[160])
        mask = token_mask(sa.select_blocks(q, k, v, config=SMALL, prompt_len=160, backend="reference"))
        error, _ = error_against_sdpa(out[None], q, k, v, mask)
        assert error < 1e-12, start


def chunks_of(length, cuts, dtype):
    """One prompt, and its chunks with all keys up to their ends."""
    q, k, v = structured_qkv(1, length, length, 4, 2, 16, dtype=dtype, seed=5)
    return (q, k, v), [(q[:, low:high], k[:, :high], v[:, :high]) for low, high in pairwise(cuts)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page_size", [None, 16])
def test_chunks_that_end_on_block_borders_equal_one_shot(page_size, backend):
    whole, chunks = chunks_of(390, (0, 64, 80, 256, 390), torch.float64)
    options = {"config": SMALL, "backend": backend}
    expected, expected_lse = run([whole], **options)
    lengths = {"prompt_lens": [390] * len(chunks)}
    if page_size is None:  # all chunks as one batch: none of them sees another
        out, lse = run(chunks, **lengths, **options)
    else:
        k, v, table = to_pages(chunks, page_size)
        q, _, _, *borders = packed(chunks)
        out, lse = sa.stem_attention_varlen(q, k, v, *borders, page_table=table, return_lse=True, **lengths, **options)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(lse, expected_lse, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", ["small blocks", "default", "angelslim"])
def test_chunks_that_end_anywhere_keep_within_the_budget_of_the_whole_prompt(config, backend):
    settings = CONFIGS[config]
    size, length = settings.block_size, 1000
    _, chunks = chunks_of(length, (0, 37, 200, 201, 555, length), torch.float32)
    budgets = torch.tensor(row_budgets(settings, -(-length // size)))
    for chunk in chunks:
        selection = sa.select_blocks(*chunk, config=settings, prompt_len=length, backend=backend)
        selection.validate()
        rows = budgets[selection.first_row : selection.first_row + selection.rows]
        if settings.forced == "inside":
            assert (selection.counts == rows).all()
        else:
            assert (selection.counts <= rows).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_that_end_anywhere_lose_no_more_than_whole_prompts_do(backend):
    whole, chunks = chunks_of(1500, (0, 333, 700, 1001, 1500), torch.float32)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2).double() for x in whole), is_causal=True, enable_gqa=True
    ).transpose(1, 2)[0]

    def loss(out):
        return float((out.double() - dense).norm() / dense.norm())

    one_shot, _ = run([whole], config=SMALL, backend=backend)
    chunked, _ = run(chunks, config=SMALL, backend=backend, prompt_lens=[1500] * len(chunks))
    assert 0 < loss(chunked) < 1.2 * loss(one_shot)


@pytest.mark.parametrize("backend", BACKENDS)
def test_prompts_under_the_dense_limit_are_dense_beside_longer_ones(backend):
    config = sa.StemConfig(block_size=16, min_blocks=3, sink_blocks=1, local_blocks=1, tail_blocks=0, dense_below=200)
    parts = sequences([(0, 150), (0, 300), (20, 100)])
    out, lse = run(parts, config=config, backend=backend, prompt_lens=[150, 300, 250])
    everything = sa.StemConfig(block_size=16, dense_below=10**9)
    expected = [run([parts[0]], config=everything, backend=backend), run([parts[1]], config=config, backend=backend)]
    assert torch.equal(out[:450], torch.cat([x for x, _ in expected]))
    assert torch.equal(lse[:, :450], torch.cat([x for _, x in expected], 1))
    assert not torch.allclose(out[450:], run([parts[2]], config=everything, backend=backend)[0])  # its prompt is long


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spans", [[(0, 0)], [(5, 5)], [(0, 0), (0, 40), (0, 0), (9, 9)], [(0, 40), (0, 0)]], ids=str)
def test_empty_sequences_take_no_room(spans, backend):
    parts = sequences(spans)
    q, _, _, *borders = packed(parts)
    k, v, table = to_pages(parts, 16)
    for out, lse in (
        run(parts, config=SMALL, backend=backend),
        sa.stem_attention_varlen(q, k, v, *borders, page_table=table, config=SMALL, return_lse=True, backend=backend),
    ):
        assert out.shape == q.shape
        assert lse.shape == (4, len(q))
        if len(q):
            assert equal((out, lse), run([part for part in parts if part[0].shape[1]], config=SMALL, backend=backend))
