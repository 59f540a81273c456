"""What a policy is: something that picks key blocks for queries."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from stem_attention.config import StemConfig
from stem_attention.errors import bad_argument
from stem_attention.selection import BlockSelection


class Policy(Protocol):
    """Chooses the key blocks that each query block attends to; a kernel then runs the choice."""

    @property
    def name(self) -> str:
        """Short name for tables and the command line."""
        ...

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, prompt_len: int | None = None
    ) -> BlockSelection:
        """Select.

        Args:
            q: ``(batch, q_len, q_heads, dim)``, the last ``q_len`` positions of ``kv_len``.
            k: ``(batch, kv_len, kv_heads, dim)``; query head ``h`` reads kv head ``h // (q_heads // kv_heads)``.
            v: The shape of ``k``.
            scale: Softmax scale, ``1 / sqrt(dim)`` unless given.
            prompt_len: Tokens of the whole prompt, ``>= kv_len``; ``kv_len`` unless prefill comes in chunks.
        """
        ...


def check_is_config(config: object) -> None:
    """Check what a policy takes as its config.

    Raises:
        ValueError: It is no StemConfig.
    """
    if not isinstance(config, StemConfig):
        raise bad_argument("config", "a StemConfig", type(config).__name__, "build one with StemConfig(...)")
