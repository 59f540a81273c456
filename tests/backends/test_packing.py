"""A call whose keys and values lie in an fp8 cache is the call with their values times their scales."""

from __future__ import annotations

import pytest
import torch

from stem_attention import Mass, Stem
from stem_attention.backends import run
from stem_attention.call import Call, PackedBatch
from stem_attention.testing import make_qkv, to_pages

LENGTHS = ((90, 90), (1, 77), (33, 150))
FP8 = torch.float8_e4m3fn


def quantised(page_size: int, by_head: bool, device: str = "cpu", dtype: torch.dtype = torch.bfloat16):
    """Queries, an fp8 cache in pages, its scales, the batch, and keys and values as they should be read."""
    single = [make_qkv(1, *lengths, 4, 2, 16, seed=i, dtype=dtype, device=device) for i, lengths in enumerate(LENGTHS)]
    q, k, v = (torch.cat(x, 1)[0] for x in zip(*single, strict=True))
    scales = [torch.tensor([0.02, 0.07] if by_head else 0.03, device=device) * (1 + i) for i in (0, 1)]
    stored = [(x.float() / scale.view(-1, 1)).to(FP8) for x, scale in zip((k, v), scales, strict=True)]
    read = [(x.float() * scale.view(-1, 1)).to(dtype) for x, scale in zip(stored, scales, strict=True)]
    q_lens, kv_lens = zip(*LENGTHS, strict=True)
    pages, table = zip(
        *(to_pages(x.view(torch.uint8), kv_lens, page_size, fill=0x7F) for x in stored), strict=True
    )  # 0x7f: nan
    batch = PackedBatch.plan(q_lens, kv_lens, page_table=table[0], device=q.device)
    plain = PackedBatch.plan(q_lens, kv_lens, device=q.device)
    return q, [x.view(FP8) for x in pages], scales, batch, read, plain


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("policy", [Mass(block_size=32), Stem(block_size=16, stride=4)], ids=["mass", "stem"])
def test_attention_from_an_fp8_cache_is_that_of_its_numbers(policy, by_head):
    q, (k, v), scales, batch, read, plain = quantised(8, by_head)
    backend = "torch"
    out, lse = run(Call(q, k, v, policy, 0.2, 0, batch, 0, True, backend, k_scale=scales[0], v_scale=scales[1]))
    expected, expected_lse = run(Call(q, *read, policy, 0.2, 0, plain, 0, True, backend))
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    assert not torch.equal(out, run(Call(q, *read, policy, 0.21, 0, plain, 0, True, backend))[0])
