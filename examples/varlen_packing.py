"""Prompts of different lengths packed into one tensor, without padding: each is computed as if it came alone."""

from itertools import accumulate

import torch

from stem_attention import StemConfig, stem_attention, stem_attention_varlen

torch.manual_seed(0)
lengths = [700, 5000, 2300]
borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
q, k, v = (torch.randn(sum(lengths), heads, 64) for heads in (8, 2, 2))

config = StemConfig(dense_below=1024)
packed = stem_attention_varlen(q, k, v, borders, borders, max(lengths), max(lengths), config=config)

for start, length in zip(borders.tolist(), lengths, strict=False):
    one = slice(start, start + length)
    alone = stem_attention(q[None, one], k[None, one], v[None, one], config=config)[0]
    how = "dense" if length < 1024 else "sparse"
    print(f"{length} tokens, {how}: largest difference from running alone {(packed[one] - alone).abs().max():.1e}")
    torch.testing.assert_close(packed[one], alone, atol=1e-5, rtol=0)
