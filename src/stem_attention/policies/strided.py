"""The strided pattern of Sparse Transformers (arXiv 1904.10509), at block level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from stem_attention.policies.pattern import check_counts, select_by_rule
from stem_attention.selection import BlockSelection


@dataclass(frozen=True)
class Strided:
    """Keep a window and every n-th block before it; see :class:`stem_attention.policies.Policy` for the call.

    Attributes:
        window_blocks: Blocks up to and including the diagonal that every row keeps. At least 1.
        stride_blocks: Of the earlier blocks, every ``stride_blocks``-th is kept, counted back from the diagonal, so that
            any block reaches any later one in two layers when ``window_blocks >= stride_blocks``.
        block_size: Tokens per block.
    """

    name: ClassVar[str] = "strided"

    window_blocks: int = 8
    stride_blocks: int = 8
    block_size: int = 128

    def __post_init__(self) -> None:
        check_counts(self, window_blocks=1, stride_blocks=1, block_size=1)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, prompt_len: int | None = None
    ) -> BlockSelection:
        def rule(rows: Tensor, columns: Tensor) -> Tensor:
            return (columns > rows - self.window_blocks) | ((rows - columns) % self.stride_blocks == 0)

        return select_by_rule(q, k, self.block_size, rule)
