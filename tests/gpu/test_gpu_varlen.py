"""On a GPU: packed batches, their keys packed too or in a paged cache."""

from itertools import pairwise

import pytest
import torch
from tests.rigs import equal

from stem_attention import Mass, Stem, stem_attention, stem_attention_varlen
from stem_attention.policies import SinkWindow
from stem_attention.testing import borders, pack, structured_qkv

from .common import LENGTHS, RULES, no_synchronisation, on_gpu

pytestmark = on_gpu

SPARSE = {"policy": Stem(), "dense_below": 0}
CALLS = {
    "stem": SPARSE,
    "mass": {"policy": Mass(), "dense_below": 0},
    "factors": {"policy": RULES["factors"](4), "dense_below": 0},
    "dense-below": {"policy": Stem(), "dense_below": 1000},
    "paper-64": {"policy": Stem.paper(block_size=64), "dense_below": 0},
    "extra": {"policy": Stem.paper(forced="extra"), "dense_below": 0},
    "angelslim": {"policy": Stem.angelslim(), "dense_below": 0},
    "pattern": {"policy": SinkWindow(), "dense_below": 0},
}


def sequences(dim=128, heads=(4, 2), dtype=torch.bfloat16):
    """q, k and v of each."""
    return [structured_qkv(1, *lengths, *heads, dim, dtype, "cuda", seed=i) for i, lengths in enumerate(LENGTHS)]


def run(single, page=0, **options):
    """``(out, lse)``."""
    return stem_attention_varlen(**pack(single, page), return_lse=True, **options)


def assert_each_as_alone(out, lse, single, prompt_lens=None, **options):
    for i, (low, high) in enumerate(pairwise(borders([q.shape[1] for q, _, _ in single]).tolist())):
        if low == high:
            continue
        prompt_len = None if prompt_lens is None else prompt_lens[i]
        alone, norm = stem_attention(*single[i], return_lse=True, prompt_len=prompt_len, **options)
        torch.testing.assert_close(out[low:high], alone[0], atol=4e-3, rtol=2e-2)
        torch.testing.assert_close(lse[:, low:high], norm[0], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("page", [0, 1, 16, 64, 128, 256])
def test_each_sequence_is_as_if_alone(page, call, backend):
    single, options = sequences(), CALLS[call]
    results = run(single, page, **options, backend=backend)
    assert_each_as_alone(*results, single, **options, backend=backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("dim", "heads"), [(64, (8, 1)), (80, (7, 1)), (256, (4, 4))])
@pytest.mark.parametrize("page", [0, 16, 64])
def test_every_head_dim_and_group(page, dim, heads, dtype, backend):
    single = sequences(dim, heads, dtype)
    results = run(single, page, **SPARSE, backend=backend)
    assert_each_as_alone(*results, single, **SPARSE, backend=backend)


@pytest.mark.parametrize("page", [0, 1, 16, 64])
@pytest.mark.parametrize("call", ["stem", "extra", "mass"])
def test_prompts_that_are_still_to_come(call, page, backend):
    single, prompts = sequences(), [kv_len + 3000 for _, kv_len in LENGTHS]
    results = run(single, page, **CALLS[call], prompt_lens=prompts, backend=backend)
    assert_each_as_alone(*results, single, prompts, **CALLS[call], backend=backend)


def test_borders_may_lie_on_the_device():
    batch = pack(sequences())
    there = {name: batch[name].cuda() for name in ("cu_seqlens_q", "cu_seqlens_k")}
    results = [stem_attention_varlen(**{**batch, **changes}, **SPARSE) for changes in ({}, there)]
    assert torch.equal(*results)


@pytest.mark.parametrize("call", ["stem", "mass", "factors"])
@pytest.mark.parametrize("page", [0, 16])
def test_the_host_never_waits(page, call, backend):
    batch = pack(sequences(), page)
    first = stem_attention_varlen(**batch, **CALLS[call], backend=backend)
    with no_synchronisation():
        again = stem_attention_varlen(**batch, **CALLS[call], backend=backend)
    assert torch.equal(again, first)


@pytest.mark.parametrize("call", ["stem", "mass"])
def test_a_page_of_the_table_that_does_not_exist_reads_nothing_outside(call, backend):
    batch = pack(sequences(), 64)
    for wild in (1 << 30, -(1 << 30)):
        batch["page_table"].fill_(wild)
        stem_attention_varlen(**batch, **CALLS[call], backend=backend)
    torch.cuda.synchronize()  # an access outside would have ended the context


@pytest.mark.parametrize("call", CALLS)
def test_the_composition_of_a_batch_never_changes_a_bit(call, backend):
    single, options = sequences(), {**CALLS[call], "backend": backend}
    alone = [run([part], **options) for part in single]
    for order in ([6, 5, 4, 3, 2, 1, 0], [4, 1], [1, 3, 1]):
        out, lse = run([single[i] for i in order], **options)
        assert torch.equal(out, torch.cat([alone[i][0] for i in order]))
        assert torch.equal(lse, torch.cat([alone[i][1] for i in order], 1))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("page", [1, 16, 64, 128, 256])
def test_paged_keys_give_the_bits_of_packed_keys(page, call, backend):
    single, options = sequences(), CALLS[call]
    packed = run(single, **options, backend=backend)
    assert equal(run(single, page, **options, backend=backend), packed)


def test_a_pool_of_slots_and_vllms_cache_are_read_in_place(backend):
    single = sequences()
    batch, slots, pages = (pack(single, page) for page in (0, 1, 16))
    expected = stem_attention_varlen(**batch, **SPARSE, backend=backend)
    pools = {name: slots[name][:, 0].unsqueeze(1) for name in "kv"}  # SGLang: (slots, heads, dim)
    assert torch.equal(stem_attention_varlen(**{**slots, **pools}, **SPARSE, backend=backend), expected)
    fused = (
        torch.cat([pages["k"], pages["v"]], -1).transpose(1, 2).contiguous().transpose(1, 2)
    )  # vLLM: heads first, k beside v
    halves = dict(zip("kv", torch.split(fused, 128, -1), strict=True))
    assert torch.equal(stem_attention_varlen(**{**pages, **halves}, **SPARSE, backend=backend), expected)
