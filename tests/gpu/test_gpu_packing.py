"""Packed keys and values are those that the cache holds, in each layout that a server has."""

from __future__ import annotations

import pytest
import torch

from stem_attention import Mass
from stem_attention.backends import run
from stem_attention.backends.reference import packing as reference
from stem_attention.backends.triton import packing
from stem_attention.backends.triton.program import Launches
from stem_attention.call import Call, PackedBatch

from .common import LENGTHS, on_gpu

pytestmark = on_gpu

HEADS, FP8 = 2, torch.float8_e4m3fn


def cached(page, dim, together, by_head):
    """Queries in bf16, a shuffled cache in fp8, its scales and the batch."""
    q_lens, kv_lens = zip(*LENGTHS, strict=True)
    counts = [-(-length // page) for length in kv_lens]
    order = torch.randperm(sum(counts), device="cuda").to(torch.int32)
    table = torch.full((len(counts), max(counts)), 1 << 30, dtype=torch.int32, device="cuda")
    for line, part in zip(table, order.split(counts), strict=True):
        line[: len(part)] = part
    q = torch.randn(sum(q_lens), 8, dim, device="cuda", dtype=torch.bfloat16)
    if together:  # keys before values in the last dimension, heads before slots, as vLLM may have them
        cache = torch.randn(sum(counts), HEADS, page, 2 * dim, device="cuda").mul(50).to(FP8).transpose(1, 2)
        k, v = cache[..., :dim], cache[..., dim:]
    else:
        k, v = (torch.randn(sum(counts), page, HEADS, dim, device="cuda").mul(50).to(FP8) for _ in range(2))
    scales = [torch.tensor([x, 2 * x] if by_head else x, device="cuda") for x in (0.02, 0.01)]
    batch = PackedBatch.plan(q_lens, kv_lens, page_table=table, device=q.device)
    return Call(q, k, v, Mass(), dim**-0.5, batch=batch, dense_below=0, k_scale=scales[0], v_scale=scales[1])


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("page", [1, 16, 64])
def test_keys_and_values_are_the_twins(page, dim, together, by_head):
    call = cached(page, dim, together, by_head)
    pairs = (call.k, call.k_scale), (call.v, call.v_scale)
    for read, (cache, scale) in zip(packing.packed(call, Launches()), pairs, strict=True):
        assert torch.equal(read, reference.packed(cache, scale, call.batch, torch.bfloat16))


def test_a_call_from_an_fp8_cache_is_the_call_with_its_numbers():
    call = cached(16, 128, True, True)
    k, v = (reference.packed(x, s, call.batch, torch.bfloat16) for x, s in ((call.k, call.k_scale), (call.v, call.v_scale)))
    batch = PackedBatch.plan(*zip(*LENGTHS, strict=True), device=k.device)
    expected, _ = run(Call(call.q, k, v, call.policy, call.scale, batch=batch, dense_below=0))
    for _ in range(3):  # recorded, and run again
        assert torch.equal(run(call)[0], expected)


def test_pages_of_single_tokens_run_on_the_hopper_kernel_like_packed_keys():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper card")
    call = cached(1, 128, False, False)
    k, v = (x.to(torch.bfloat16) for x in (call.k, call.v))
    plain = Call(call.q, k, v, call.policy, call.scale, batch=call.batch, dense_below=0, backend="hopper")
    keys, values = (torch.cat([call.batch.sequence(x, i) for i in range(call.batch.sequences)]) for x in (k, v))
    batch = PackedBatch.plan(*zip(*LENGTHS, strict=True), device=k.device)
    expected, _ = run(Call(call.q, keys, values, call.policy, call.scale, batch=batch, dense_below=0, backend="hopper"))
    for _ in range(3):
        assert torch.equal(run(plain)[0], expected)
