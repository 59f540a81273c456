"""Eager torch that does only the kept work: CPU, and any other device torch runs on."""

from torch import Tensor

from stem_attention.backends.base import Backend, Request
from stem_attention.backends.torch.attention import attend
from stem_attention.call import Call
from stem_attention.selection import BlockSelection


class TorchBackend(Backend):
    """Reads the counts on the host: one synchronisation per call."""

    name = "torch"

    def why_not(self, request: Request) -> str | None:
        """Every dtype, head dimension and block size runs, wherever torch runs."""
        return None

    def attend(self, call: Call, selection: BlockSelection) -> tuple[Tensor, Tensor]:
        """Gather the kept blocks of each row and multiply."""
        return attend(call.q, call.k, call.v, selection, call.scale, call.return_lse, call.sinks, call.softcap)
