"""On a GPU: pages far away, and no copy of what is passed in as a view. See test_gpu_runtime.py for long prompts."""

import math

import pytest
import torch

from stem_attention import stem_attention, stem_attention_varlen
from stem_attention.testing.packed import borders, to_pages

from .common import GIB, MIB, SPARSE, at_most_extra_bytes, free_memory, on_gpu, random_qkv

pytestmark = [*on_gpu, pytest.mark.usefixtures("_return_memory")]


@pytest.mark.skipif(free_memory() < 14 * GIB, reason="needs 14 GiB of free GPU memory")
@pytest.mark.parametrize("page", [16, 128])
def test_pages_beyond_2_to_the_31_elements(page, backend):
    q, k, v = (x[0] for x in random_qkv(1, 3000, 3000, 4, 2, 128))
    starts = borders([3000])
    (keys, table), (values, _) = (to_pages(x, [3000], page) for x in (k, v))
    first = (1 << 31) // keys[0].numel() + 7
    far = []
    for cache in (keys, values):
        store = torch.full((first + len(cache), *cache.shape[1:]), math.nan, dtype=cache.dtype, device="cuda")
        store[first:] = cache
        far.append(store)
    results = [
        stem_attention_varlen(
            q, *caches, starts, starts, 3000, 3000, page_table=pages, config=SPARSE, return_lse=True, backend=backend
        )
        for caches, pages in (((keys, values), table), (far, table + first))
    ]
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("view", ["heads first", "sliced out of a fused projection", "expanded heads"])
def test_the_whole_call_copies_no_view(view, backend):
    length = 32768
    if view == "heads first":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in random_qkv(1, length, length, 16, 16, 64))
    elif view == "expanded heads":
        q, k, v = random_qkv(1, length, length, 16, 1, 64)
        k, v = (x.expand(-1, -1, 16, -1) for x in (k, v))
    else:
        fused = random_qkv(1, length, length, 48, 1, 64)[0]
        q, k, v = fused[:, :, :16], fused[:, :, 16:32], fused[:, :, 32:]
    stem_attention(q, k, v, config=SPARSE, backend=backend)
    result, keys_pooled = length * 16 * 64 * 2, 2 * length * 16 * 64 * 2 * 16 // 128
    with at_most_extra_bytes(result + keys_pooled + 160 * MIB):
        stem_attention(q, k, v, config=SPARSE, backend=backend)
