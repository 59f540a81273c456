"""Window, global and random blocks: BigBird (arXiv 2007.14062), causal."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import ClassVar

import torch
from torch import Tensor

from stem_attention.policies.pattern import check_counts, select_by_rule
from stem_attention.selection import BlockSelection


@dataclass(frozen=True)
class BigBird:
    """Keep a window, global and random blocks; see :class:`stem_attention.policies.Policy` for the call.

    The random blocks follow from the seed, the head and the absolute row alone, so chunks and devices agree. Global rows
    need no rule of their own: before the prompt's first blocks there is nothing but global columns.

    Attributes:
        window_blocks: Blocks up to and including the diagonal that every row keeps. At least 1.
        global_blocks: Blocks at the start of the prompt that every row keeps.
        random_blocks: Further blocks per row and query head, drawn without repetition from those in between.
        seed: Seed of the draw.
        block_size: Tokens per block.
    """

    name: ClassVar[str] = "bigbird"

    window_blocks: int = 8
    global_blocks: int = 4
    random_blocks: int = 4
    seed: int = 0
    block_size: int = 128

    def __post_init__(self) -> None:
        check_counts(self, window_blocks=1, global_blocks=0, random_blocks=0, seed=0, block_size=1)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, prompt_len: int | None = None
    ) -> BlockSelection:
        first, end = (k.shape[1] - q.shape[1]) // self.block_size, -(-k.shape[1] // self.block_size)
        absolute = range(first, end if q.shape[1] else first)

        def rule(rows: Tensor, columns: Tensor) -> Tensor:
            drawn = [[self._draw(head, row) for row in absolute] for head in range(q.shape[2])]
            ids = torch.tensor(drawn, device=q.device, dtype=torch.int64).view(q.shape[2], len(absolute), self.random_blocks)
            mask = (columns < self.global_blocks) | (columns > rows - self.window_blocks)
            return mask.expand(q.shape[2], -1, -1).clone().scatter_(2, ids, True)

        return select_by_rule(q, k, self.block_size, rule)

    def _draw(self, head: int, row: int) -> tuple[int, ...]:
        return _draw(self.seed, head, row, self.global_blocks, row - self.window_blocks + 1, self.random_blocks)


@lru_cache(maxsize=1 << 17)
def _draw(seed: int, head: int, row: int, low: int, high: int, count: int) -> tuple[int, ...]:
    """``count`` block ids of ``[low, high)``; where there are fewer, the diagonal, which is kept anyway, fills up."""
    among = range(low, max(low, high))
    ids = Random(f"{seed} {head} {row}").sample(among, min(count, len(among)))
    return (*ids, *[row] * (count - len(ids)))
