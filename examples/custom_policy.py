"""A policy of your own in 30 lines: rank key blocks by how near their mean key is to the mean query of a block."""

from dataclasses import dataclass, field

import torch
from torch.nn.functional import pad

from stem_attention import StemConfig, block_sparse_attention, select_blocks
from stem_attention.policies import Ranked


@dataclass(frozen=True)
class MeanPooling(Ranked):
    """Budgets, forced blocks and the dense tail are those of `config`; only the ranking is ours."""

    config: StemConfig = field(default_factory=StemConfig)
    name: str = "mean-pooling"

    def scores(self, q, k, v, scale, first_row, end_row):
        size, start = self.config.block_size, k.shape[1] - q.shape[1]
        q = pad(q, (0, 0, 0, 0, start % size, -k.shape[1] % size))  # to whole blocks; absent tokens add nothing
        k = pad(k, (0, 0, 0, 0, 0, -k.shape[1] % size))
        queries = q.unflatten(1, (-1, size)).mean(2).transpose(1, 2)  # (batch, heads, rows, dim)
        keys = k.unflatten(1, (-1, size)).mean(2).transpose(1, 2)
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)  # means only: small
        yield first_row, scale * queries @ keys.mT


torch.manual_seed(0)
q, k, v = (torch.randn(1, 6000, heads, 64) for heads in (8, 2, 2))
ours, stems = MeanPooling()(q, k, v), select_blocks(q, k, v)
out = block_sparse_attention(q, k, v, ours)

both = (ours.to_mask() & stems.to_mask()).sum() / stems.to_mask().sum()
print(f"output {tuple(out.shape)}, kept {ours.density():.3f} of the blocks; Stem keeps {stems.density():.3f}")
print(f"{both:.1%} of Stem's blocks are also ours, forced ones and the dense tail among them")
