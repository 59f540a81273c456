"""A policy of your own in thirty lines: keep the key blocks whose mean key is nearest to the mean query of a row.

Any command and host runs it by name, from where Python can import this file:

    PYTHONPATH=examples stem-attention run --policy custom_policy:Nearest:keep=32
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import pad

from stem_attention import BlockSelection, Policy, select_blocks, stem_attention


@dataclass(frozen=True)
class Nearest(Policy):
    """Keep the ``keep`` nearest key blocks of every row, its own block among them."""

    name: ClassVar[str] = "nearest"

    keep: int = 16
    block_size: int = 64

    def __call__(self, q, k, v, *, scale=None, prompt_len=None):
        size, q_len, kv_len = self.block_size, q.shape[1], k.shape[1]
        start, to_border = kv_len - q_len, -kv_len % size  # queries are the last q_len of kv_len positions
        queries = pad(q, (0, 0, 0, 0, start % size, to_border)).unflatten(1, (-1, size)).mean(2).transpose(1, 2)
        keys = pad(k, (0, 0, 0, 0, 0, to_border)).unflatten(1, (-1, size)).mean(2).transpose(1, 2)
        scores = queries @ keys.repeat_interleave(q.shape[2] // k.shape[2], 1).mT  # (batch, heads, rows, key blocks)
        columns = torch.arange(scores.shape[3], device=q.device)
        rows = columns[start // size :, None]
        scores = scores.masked_fill(columns > rows, -torch.inf).masked_fill(columns == rows, torch.inf)
        best = scores.topk(min(self.keep, len(columns))).indices
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(3, best, True) & (columns <= rows)
        return BlockSelection.from_mask(kept, block_size=size, q_len=q_len, kv_len=kv_len)

    def row_counts(self, num_blocks):
        return tuple(min(row + 1, self.keep) for row in range(num_blocks))


if __name__ == "__main__":
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 6000, heads, 64) for heads in (8, 2, 2))
    policy = Nearest(keep=24)
    out = stem_attention(q, k, v, policy=policy)
    kept = select_blocks(q, k, v, policy=policy).density()
    print(f"output {tuple(out.shape)}, kept {kept:.3f} of the blocks, as density() said: {policy.density(6000):.3f}")
