"""Chunked prefill over a paged key/value cache, as servers keep it: the blocks kept are those of one long call."""

import torch

from stem_attention import stem_attention, stem_attention_varlen

torch.manual_seed(0)
PROMPT, CHUNK, PAGE = 6000, 2048, 16
q, k, v = (torch.randn(PROMPT, heads, 64) for heads in (8, 2, 2))

pages_needed = -(-PROMPT // PAGE)
table = torch.randperm(2 * pages_needed)[:pages_needed].int()[None]  # pages lie anywhere in the cache
keys, values = (torch.full((2 * pages_needed, PAGE, 2, 64), torch.nan) for _ in range(2))

chunks = []
for start in range(0, PROMPT, CHUNK):
    end = min(start + CHUNK, PROMPT)
    position = torch.arange(start, end)
    page, slot = table[0, position // PAGE].long(), position % PAGE
    keys[page, slot], values[page, slot] = k[start:end], v[start:end]
    queries_at, keys_at = (torch.tensor([0, length], dtype=torch.int32) for length in (end - start, end))
    out = stem_attention_varlen(
        q[start:end], keys, values, queries_at, keys_at, end - start, end, page_table=table, prompt_lens=[PROMPT], dense_below=0
    )
    chunks.append(out)
    print(f"tokens {start} to {end}: {end} keys in {-(-end // PAGE)} pages")

whole = stem_attention(q[None], k[None], v[None], dense_below=0)[0]
difference = (torch.cat(chunks) - whole).abs().max()
print(f"largest difference from one call over the whole prompt: {difference:.1e}")
assert difference < 1e-5
