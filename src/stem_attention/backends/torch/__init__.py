"""Eager torch that does only the kept work: CPU, and any other device torch runs on."""

from __future__ import annotations

from torch import Tensor

from stem_attention.backends.base import Backend, Request
from stem_attention.backends.torch.attention import attend
from stem_attention.config import StemConfig
from stem_attention.policies.of_config import policy_of
from stem_attention.selection import BlockSelection


class TorchBackend(Backend):
    """Reads the counts on the host: one synchronisation per call."""

    name = "torch"

    def supports(self, request: Request) -> str | None:
        """Every dtype, head dimension and block size, wherever torch runs."""
        return None

    def select(self, q: Tensor, k: Tensor, v: Tensor, config: StemConfig, scale: float, prompt_len: int) -> BlockSelection:
        """Run the policy of the config."""
        return policy_of(config)(q, k, v, scale=scale, prompt_len=prompt_len)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float, return_lse: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Gather the kept blocks of each row and multiply."""
        return attend(q, k, v, selection, scale, return_lse)
