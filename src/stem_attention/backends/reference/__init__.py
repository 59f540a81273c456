"""The oracle: every equation as the paper states it, to be read beside it. Slow, any device, fp32 or fp64."""

from __future__ import annotations

from torch import Tensor

from stem_attention.backends.base import Backend, Request
from stem_attention.backends.reference.attention import attend
from stem_attention.backends.reference.mass import select_by_mass
from stem_attention.backends.reference.select import select
from stem_attention.config import StemConfig
from stem_attention.selection import BlockSelection


class ReferenceBackend(Backend):
    """Never picked by ``backend="auto"``."""

    name = "reference"

    def supports(self, request: Request) -> str | None:
        """It runs everything that torch runs."""
        return None

    def select(self, q: Tensor, k: Tensor, v: Tensor, config: StemConfig, scale: float, prompt_len: int) -> BlockSelection:
        """Choose blocks by scoring every antidiagonal of every block pair, or by estimating every pool's attention."""
        if config.keep == "mass":
            return select_by_mass(q, k, config, scale, prompt_len)
        return select(q, k, v, config, scale, prompt_len)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float, return_lse: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Masked softmax, one query block at a time."""
        out, lse = attend(q, k, v, selection, scale)
        return out, lse if return_lse else lse.new_empty(0)
