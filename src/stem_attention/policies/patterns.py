"""Fixed patterns: which blocks are kept follows from their positions alone."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random

import torch
from torch import Tensor
from typing_extensions import Self

from stem_attention.blocks import BlockGrid, block_count
from stem_attention.policies.base import Policy, check_integers
from stem_attention.selection import PAD, BlockSelection


class Pattern(Policy):
    """Keep the causal blocks that a rule over positions keeps, the diagonal, and all that the prompt's last rows see.

    Rows are counted without tensors: torch.compile asks for the counts while it traces, when tensors hold no numbers.
    """

    @abstractmethod
    def keeps(self, rows: Tensor, columns: Tensor, heads: int) -> Tensor:
        """Mark the key blocks ``columns`` that the rule keeps in query blocks ``rows``, int64 ``(rows, 1)``.

        Bool ``(rows, columns)``, or ``(heads, rows, columns)`` where heads differ. After the diagonal anything may be marked.
        """

    @abstractmethod
    def count(self, row: int) -> int:
        """Count what the rule keeps in a row, which may be more than there is."""

    def row_counts(self, num_blocks: int) -> tuple[int, ...]:
        tail = num_blocks - self.tail_blocks
        return tuple(row + 1 if row >= tail else min(row + 1, self.count(row)) for row in range(num_blocks))

    def resized(self, size: int, blocks: int, density: float) -> Self:
        return replace(self, window_blocks=size)  # type: ignore[type-var]

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, prompt_len: int | None = None
    ) -> BlockSelection:
        (batch, q_len, heads, _), grid = q.shape, BlockGrid.of(q, k, self.block_size)
        columns = torch.arange(grid.key_blocks, device=q.device)
        rows = columns[grid.first_row : grid.end_row, None]
        tail = block_count(grid.kv_len if prompt_len is None else prompt_len, self.block_size) - self.tail_blocks
        mask = ((self.keeps(rows, columns, heads) | (rows >= tail)) & (columns <= rows)) | (columns == rows)
        mask = mask.expand(1, *mask.shape[-3:-2] or (1,), -1, -1)
        one = BlockSelection.from_mask(mask, block_size=self.block_size, q_len=q_len, kv_len=grid.kv_len)
        # The pattern is sorted once and then repeated, as it is the same for every sequence and often for every head.
        indices, counts = one.indices.expand(batch, heads, -1, -1), one.counts.expand(batch, heads, -1)
        return BlockSelection(indices.contiguous(), counts.contiguous(), self.block_size, q_len, grid.kv_len)


@dataclass(frozen=True)
class SinkWindow(Pattern):
    """Keep the prompt's first blocks and the latest ones.

    Attributes:
        sink_blocks: Blocks at the start of the prompt that every row keeps.
        window_blocks: Blocks up to and including the diagonal that every row keeps. At least 1.
    """

    name = "sink-window"

    sink_blocks: int = 4
    window_blocks: int = 12
    block_size: int = 128

    def check(self) -> None:
        check_integers(self, sink_blocks=0, window_blocks=1)

    def count(self, row: int) -> int:
        return self.sink_blocks + self.window_blocks

    def keeps(self, rows: Tensor, columns: Tensor, heads: int) -> Tensor:
        return (columns < self.sink_blocks) | (columns > rows - self.window_blocks)


@dataclass(frozen=True)
class Strided(Pattern):
    """Keep a window and every n-th block before it.

    Attributes:
        window_blocks: Blocks up to and including the diagonal that every row keeps. At least 1.
        stride_blocks: Of the earlier blocks, every ``stride_blocks``-th is kept, counted back from the diagonal, so that
            any block reaches any later one in two layers when ``window_blocks >= stride_blocks``.
    """

    name = "strided"

    window_blocks: int = 8
    stride_blocks: int = 8
    block_size: int = 128

    def check(self) -> None:
        check_integers(self, window_blocks=1, stride_blocks=1)

    def resized(self, size: int, blocks: int, density: float) -> Self:
        # About half of the density for the stride; the window, which is tuned, then has the other half.
        return replace(self, window_blocks=size, stride_blocks=min(blocks, max(2, round(2 / density))))

    def count(self, row: int) -> int:
        window, stride = self.window_blocks, self.stride_blocks  # multiples of the stride inside the window count once
        return min(row + 1, window) + max(0, row // stride - (window - 1) // stride)

    def keeps(self, rows: Tensor, columns: Tensor, heads: int) -> Tensor:
        return (columns > rows - self.window_blocks) | ((rows - columns) % self.stride_blocks == 0)


@dataclass(frozen=True)
class Longformer(Pattern):
    """Keep a window and the global blocks.

    A global block is seen by every later row and sees everything before it. Longformer makes the tokens of the task
    global, for question answering the question: here the prompt's first blocks and its last ones. Under the causal
    limit the first ones matter as columns alone, and the last ones as rows alone.

    Attributes:
        window_blocks: Blocks up to and including the diagonal that every row keeps. At least 1.
        global_blocks: Global blocks at the start of the prompt.
        tail_blocks: Global blocks at the end of the whole prompt. 0 leaves the pattern of ``SinkWindow``.
    """

    name = "longformer"

    window_blocks: int = 8
    global_blocks: int = 4
    tail_blocks: int = 2
    block_size: int = 128

    def check(self) -> None:
        check_integers(self, window_blocks=1, global_blocks=0, tail_blocks=0)

    def count(self, row: int) -> int:
        return self.global_blocks + self.window_blocks

    def keeps(self, rows: Tensor, columns: Tensor, heads: int) -> Tensor:
        return (columns < self.global_blocks) | (columns > rows - self.window_blocks)


@dataclass(frozen=True)
class BigBird(Pattern):
    """Keep a window, global and random blocks.

    The random blocks follow from the seed, the head and the absolute row alone, so chunks and devices agree. Global rows
    need no rule of their own: before the prompt's first blocks there is nothing but global columns.

    Attributes:
        window_blocks: Blocks up to and including the diagonal that every row keeps. At least 1.
        global_blocks: Blocks at the start of the prompt that every row keeps.
        random_blocks: Further blocks per row and query head, drawn without repetition from those in between.
        seed: Seed of the draw.
    """

    name = "bigbird"

    window_blocks: int = 8
    global_blocks: int = 4
    random_blocks: int = 4
    seed: int = 0
    block_size: int = 128

    def check(self) -> None:
        check_integers(self, window_blocks=1, global_blocks=0, random_blocks=0, seed=0)

    def resized(self, size: int, blocks: int, density: float) -> Self:
        window = max(1, round(size * self.window_blocks / max(1, self.window_blocks + self.random_blocks)))
        return replace(self, window_blocks=window, random_blocks=size - window)

    def count(self, row: int) -> int:
        return self.global_blocks + self.window_blocks + self.random_blocks

    def keeps(self, rows: Tensor, columns: Tensor, heads: int) -> Tensor:
        before = [(row, row - self.window_blocks + 1) for row in rows.flatten().tolist()]
        drawn = [
            [_draw(self.seed, h, row, self.global_blocks, end, self.random_blocks) for row, end in before] for h in range(heads)
        ]
        ids = torch.tensor(drawn, device=rows.device, dtype=torch.int64).view(heads, len(rows), self.random_blocks)
        mask = (columns < self.global_blocks) | (columns > rows - self.window_blocks)
        return mask.expand(heads, -1, -1).clone().scatter_(2, ids, True)


@lru_cache(maxsize=1 << 17)
def _draw(seed: int, head: int, row: int, low: int, high: int, count: int) -> tuple[int, ...]:
    """``count`` block ids of ``[low, high)``; where there are fewer, the diagonal, which is kept anyway, fills up."""
    among = range(low, max(low, high))
    ids = Random(f"{seed} {head} {row}").sample(among, min(count, len(among)))
    return (*ids, *[row] * (count - len(ids)))


@dataclass(frozen=True)
class Dense(Policy):
    """Keep every causal block: what the sparse policies are measured against."""

    name = "dense"

    block_size: int = 128

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, prompt_len: int | None = None
    ) -> BlockSelection:
        return keep_everything(q, k, self.block_size)

    def row_counts(self, num_blocks: int) -> tuple[int, ...]:
        return tuple(range(1, num_blocks + 1))


def keep_everything(q: Tensor, k: Tensor, block_size: int) -> BlockSelection:
    """Select so that block-sparse attention is dense causal attention. Never waits for a GPU."""
    (batch, q_len, heads, _), grid = q.shape, BlockGrid.of(q, k, block_size)
    rows = torch.arange(grid.first_row, grid.end_row, device=q.device, dtype=torch.int32)
    ids = torch.arange(grid.end_row if q_len else 0, device=q.device, dtype=torch.int32)
    indices = torch.where(ids <= rows[:, None], ids, PAD).to(torch.int32).expand(batch, heads, -1, -1)
    counts = (rows + 1).expand(batch, heads, -1)
    return BlockSelection(indices.contiguous(), counts.contiguous(), block_size, q_len, grid.kv_len)
