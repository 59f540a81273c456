"""The oracle: every equation as the paper states it, to be read beside it. Slow, any device, fp32 or fp64."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from stem_attention.backends.base import Backend, Request, Results
from stem_attention.backends.kept import unpack
from stem_attention.backends.reference.attention import attend
from stem_attention.backends.reference.mass import select_by_mass
from stem_attention.backends.reference.select import select_by_score
from stem_attention.call import Call
from stem_attention.policies.base import Policy, softcap_for
from stem_attention.policies.mass import Mass
from stem_attention.policies.stem import Stem
from stem_attention.selection import BlockSelection

# A subclass of one of these may choose as it likes: it is asked itself.
_TWINS: dict[type[Policy], Callable[..., BlockSelection]] = {Mass: select_by_mass, Stem: select_by_score}


class ReferenceBackend(Backend):
    """Never picked by ``backend="auto"``."""

    name = "reference"

    def why_not(self, request: Request) -> str | None:
        """It runs everything that torch runs."""
        return None

    def only_by_name(self, request: Request) -> str | None:
        """It judges the others."""
        return "the oracle, only by name"

    def chooser(self, policy: Policy) -> Callable[..., object]:
        return _TWINS.get(type(policy)) or super().chooser(policy)

    def select(self, call: Call) -> BlockSelection:
        """Score every antidiagonal of every block pair, or estimate every pool's attention; other policies as they are."""
        twin = _TWINS.get(type(call.policy))
        if twin is None:
            told = softcap_for(type(call.policy).__call__, call.softcap)
            return call.policy(call.q, call.k, call.v, scale=call.scale, prompt_len=call.prompt_len, **told)
        return twin(call.q, call.k, call.v, call.policy, call.scale, call.prompt_len, call.softcap)

    def attend(self, call: Call, selection: BlockSelection) -> tuple[Tensor, Tensor]:
        """Take a masked softmax, one query block at a time."""
        out, lse = attend(call, selection)
        return out, lse if call.return_lse else lse.new_empty(0)

    def backward(self, call: Call, kept: Tensor, results: Results, d_results: Results) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the attention again, and let torch differentiate it."""
        if call.batch is not None:
            return super().backward(call, kept, results, d_results)
        with torch.enable_grad():
            q, k, v = (x.detach().requires_grad_() for x in (call.q, call.k, call.v))
            again = attend(replace(call, q=q, k=k, v=v), unpack(kept, call.grid))
        d_q, d_k, d_v = torch.autograd.grad(again, (q, k, v), d_results)
        return d_q, d_k, d_v
