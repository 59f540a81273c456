"""Prompts of different lengths packed into one tensor, without padding: each is computed as if it came alone."""

from itertools import accumulate

import torch

from stem_attention import stem_attention, stem_attention_varlen

torch.manual_seed(0)
LENGTHS, DENSE_BELOW = [700, 5000, 2300], 1024
borders = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32)
q, k, v = (torch.randn(sum(LENGTHS), heads, 64) for heads in (8, 2, 2))

packed = stem_attention_varlen(q, k, v, borders, borders, max(LENGTHS), max(LENGTHS), dense_below=DENSE_BELOW)

for start, length in zip(borders.tolist(), LENGTHS, strict=False):
    one = slice(start, start + length)
    alone = stem_attention(q[None, one], k[None, one], v[None, one], dense_below=DENSE_BELOW)[0]
    how = "dense" if length < DENSE_BELOW else "sparse"
    print(f"{length} tokens, {how}: largest difference from running alone {(packed[one] - alone).abs().max():.1e}")
    torch.testing.assert_close(packed[one], alone, atol=1e-5, rtol=0)
