"""Window and global tokens: Longformer (arXiv 2004.05150), causal and at block level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from stem_attention.policies.budget import block_count
from stem_attention.policies.pattern import check_counts, select_by_rule
from stem_attention.selection import BlockSelection


@dataclass(frozen=True)
class Longformer:
    """Keep a window and the global blocks; see :class:`stem_attention.policies.Policy` for the call.

    A global block is seen by every later row and sees everything before it. Longformer makes the tokens of the task
    global, for question answering the question: here the prompt's first blocks and its last ones. Under the causal
    limit the first ones matter as columns alone, and the last ones as rows alone.

    Attributes:
        window_blocks: Blocks up to and including the diagonal that every row keeps. At least 1.
        global_blocks: Global blocks at the start of the prompt.
        tail_blocks: Global blocks at the end of the whole prompt. 0 leaves the pattern of ``SinkWindow``.
        block_size: Tokens per block.
    """

    name: ClassVar[str] = "longformer"

    window_blocks: int = 8
    global_blocks: int = 4
    tail_blocks: int = 2
    block_size: int = 128

    def __post_init__(self) -> None:
        check_counts(self, window_blocks=1, global_blocks=0, tail_blocks=0, block_size=1)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, prompt_len: int | None = None
    ) -> BlockSelection:
        tail = block_count(k.shape[1] if prompt_len is None else prompt_len, self.block_size) - self.tail_blocks

        def rule(rows: Tensor, columns: Tensor) -> Tensor:
            return (columns < self.global_blocks) | (columns > rows - self.window_blocks) | (rows >= tail)

        return select_by_rule(q, k, self.block_size, rule)
