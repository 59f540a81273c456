"""Sink and window: StreamingLLM (arXiv 2309.17453), also known as the A-shape head of MInference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from stem_attention.policies.pattern import check_counts, select_by_rule
from stem_attention.selection import BlockSelection


@dataclass(frozen=True)
class SinkWindow:
    """Keep the prompt's first blocks and the latest ones; see :class:`stem_attention.policies.Policy` for the call.

    Attributes:
        sink_blocks: Blocks at the start of the prompt that every row keeps.
        window_blocks: Blocks up to and including the diagonal that every row keeps. At least 1.
        block_size: Tokens per block.
    """

    name: ClassVar[str] = "sink-window"

    sink_blocks: int = 4
    window_blocks: int = 12
    block_size: int = 128

    def __post_init__(self) -> None:
        check_counts(self, sink_blocks=0, window_blocks=1, block_size=1)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, prompt_len: int | None = None
    ) -> BlockSelection:
        def rule(rows: Tensor, columns: Tensor) -> Tensor:
            return (columns < self.sink_blocks) | (columns > rows - self.window_blocks)

        return select_by_rule(q, k, self.block_size, rule)
