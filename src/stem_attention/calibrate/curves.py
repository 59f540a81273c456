"""Measure what heads lose as their share rises, in the currency of the model's prediction.

A head keeps fewer blocks as its share of keep by mass rises, and its result moves. How much that matters is for the model
to say: the gradient of its prediction with respect to the head's result, times the movement, is what the prediction changes
by to first order. Scores of different heads, which have no scale in common, thus become comparable.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stem_attention.blocks import block_count
from stem_attention.models.load import Model
from stem_attention.models.prefill import default_attention, wrap_attention
from stem_attention.policies.mass import Mass, block_masses

SHARES = tuple(2.0 ** (half / 2) for half in range(-16, 19))  # that are tried: 1/256 to 512
_WORKSPACE = 1 << 26  # elements of attention weights held at a time; three tensors of that size live at once
_PARTS = 8  # of a prompt's queries, at least: each leaves out the keys behind it

# Takes a layer's index, q, k, v (1, heads, length, dim), scale and gradient (1, length, heads, dim).
Told = Callable[[int, Tensor, Tensor, Tensor, float, Tensor], None]


def head_curves(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, policy: Mass, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Estimate what the prediction changes by, and the density, of every head at each of :data:`SHARES`.

    ``q`` and ``gradient``, that of the prediction with respect to attention's result, are ``(length, q_heads, dim)``, ``k``
    and ``v`` ``(length, kv_heads, dim)``. The policy's own shares do not count. Returns three fp64 ``(q_heads, shares)``: the
    sums over queries of ``gradient · (sparse - dense)``, those of its square, and the density.
    """
    size, heads, group = policy.block_size, q.shape[1], q.shape[1] // k.shape[1]
    blocks = block_count(len(q), size)
    masses = torch.zeros(heads, blocks, blocks, dtype=torch.float64, device=q.device)
    for row, mass in block_masses(q[None], k[None], policy, scale):
        masses[:, row : row + mass.shape[2], : mass.shape[3]] = mass[0]
    columns = torch.arange(blocks, device=q.device)
    forced = policy.always_kept(columns[:, None], columns, blocks)
    causal = torch.ones_like(forced).tril()
    shares = torch.tensor(SHARES, dtype=torch.float64, device=q.device) / blocks
    # A last block that is not full is filled with queries of no gradient, and with keys that only those see.
    q, k, v, gradient = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -len(x) % size)) for x in (q, k, v, gradient))
    changes, densities = [], []
    for head in range(heads):
        kept = (~(masses[head][..., None] < shares) | forced[..., None]) & causal[..., None]
        one = q[:, head], k[:, head // group], v[:, head // group], gradient[:, head]
        changes.append(_changes(*one, kept.float(), size, scale))
        densities.append(kept.sum((0, 1)).double() / causal.sum())
    sums, squares = torch.stack(changes).unbind(1)
    return sums, squares, torch.stack(densities)


def _changes(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, kept: Tensor, size: int, scale: float) -> Tensor:
    """Of one head, ``(length, dim)``, under ``kept (blocks, blocks, shares)``: sums and sums of squares, ``(2, shares)``.

    The result enters only through its product with the gradient: a number for each pair of query and block.
    """
    total = torch.zeros(2, kept.shape[2], dtype=torch.float64, device=q.device)
    step = max(1, min(_WORKSPACE // len(k), len(q) // _PARTS) // size) * size
    for low in range(0, len(q), step):
        high = min(low + step, len(q))
        keys, values = k[:high].float(), v[:high].float()
        scores = (q[low:high].float() @ keys.T) * scale
        future = torch.arange(high, device=q.device) > torch.arange(low, high, device=q.device)[:, None]
        weights = scores.masked_fill_(future, -torch.inf).softmax(-1)
        moved = (gradient[low:high].float() @ values.T).mul_(weights)
        # (queries, keys) as (query blocks, size, key blocks): sums over the keys of a block.
        held, told = (torch.unflatten(torch.unflatten(x, 1, (-1, size)).sum(2), 0, (-1, size)) for x in (weights, moved))
        rows = kept[low // size : high // size, : high // size]
        # Where the weights of all that is kept vanish in fp32, the result counts as zero.
        left = (held @ rows).clamp(min=torch.finfo(held.dtype).tiny)
        change = ((told @ rows) / left - told.sum(-1, keepdim=True) / held.sum(-1, keepdim=True)).double()
        total += torch.stack([change, change.square()]).sum((1, 2))
    return total


class _Felt(torch.autograd.Function):
    """The identity; on the way back it tells what the gradient is."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, q: Tensor, k: Tensor, v: Tensor, told: Callable[..., None]) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.told = told
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.told(*ctx.saved_tensors, gradient)
        return gradient, None, None, None, None


@contextmanager
def feeling(model: Model, told: Told) -> Iterator[None]:
    """Report every layer when something goes backwards through the model's dense attention; activations are computed again.

    That takes a second forward pass and keeps a prompt of 32768 tokens within a GPU's memory. The model is left as it was;
    ValueError where its class cannot do that.
    """
    before, dense = model.config._attn_implementation, default_attention(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Transformers computes again where it trains. Set on these modules alone, that leaves dropout and router noise off.
    modes = [(module, module.training) for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    # transformers 5.17 has the older name of it alone; a later one deprecates that.
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"

    def watched(inner: Callable[..., Any], module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **named: Any) -> Any:
        out, weights = inner(module, q, k, v, mask, **named)
        scale, layer = named.get("scaling") or q.shape[3] ** -0.5, int(module.layer_idx)

        @torch.no_grad()
        def report(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> None:
            told(layer, q, k, v, scale, gradient)

        return _Felt.apply(out, q.detach(), k.detach(), v.detach(), report), weights  # type: ignore[no-untyped-call]

    getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    try:
        with wrap_attention(dense, watched):
            model.set_attn_implementation(dense)
            model.requires_grad_(False)
            for module, _ in modes:
                module.training = True
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in trained:
            parameter.requires_grad_(True)
        model.set_attn_implementation(before)
        getattr(model, f"{kind}_checkpointing_disable")()
