"""Eager torch that does only the kept work: CPU, and any other device torch runs on."""

from torch import Tensor

from stem_attention.backends.base import Backend, Request, Results
from stem_attention.backends.kept import unpack
from stem_attention.backends.torch.attention import attend
from stem_attention.backends.torch.backward import gradients, row_sums
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
        return attend(call, selection)

    def backward(self, call: Call, kept: Tensor, results: Results, d_results: Results) -> tuple[Tensor, Tensor, Tensor]:
        """Gather the kept blocks of each row again, and add what each row says of their keys and values."""
        if call.batch is not None:
            return super().backward(call, kept, results, d_results)
        (out, lse), (d_out, d_lse) = results, d_results
        delta = row_sums(out, d_out, d_lse)
        return gradients(call, unpack(kept, call.grid), lse, d_out, delta)
