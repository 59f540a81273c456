"""Say whether a selection or a gradient is right: nothing here is shared with the code that made it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from stem_attention import BlockSelection, Mass, Policy, Stem, select_blocks
from stem_attention.backends.reference.select import block_magnitude, block_scores, choose_row
from stem_attention.blocks import block_count
from stem_attention.testing import exact_attention, token_mask

# Of the largest score of a row: scores are summed in fp32 on the CPU, from two bf16 numbers (16 bits) on a GPU.
SCORE_TIES = {"float64": 1e-12, "cpu": 1e-5, "cuda": 1e-3}
# Of what a gradient is summed from, where little is left of the sum: weights come back from a log-sum-exp in fp32.
GRADIENT_TIE = 1e-5
# Of the least mass that is kept. A GPU sums pools in another order, so that a mean may round to the next bf16.
MASS_TIES = {"float64": 1e-9, "cpu": 1e-3, "cuda": 5e-2}


def assert_selected(
    selection: BlockSelection,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Policy,
    prompt_len: int,
    scale: float | None = None,
    softcap: float | None = None,
) -> None:
    """Assert that a policy keeps just these blocks, up to ties: by the reference's own scores in fp64, or its masses."""
    selection.validate()
    kind = "float64" if q.dtype == torch.float64 else q.device.type
    if isinstance(policy, Stem):
        return _assert_ranked(selection, q, k, v, policy, prompt_len, scale, softcap, SCORE_TIES[kind])

    def reference(share_times: float = 1.0) -> Tensor:
        asked = replace(policy, share=policy.share * share_times) if isinstance(policy, Mass) else policy
        options = {"policy": asked, "scale": scale, "softcap": softcap, "prompt_len": prompt_len}
        return select_blocks(q, k, v, backend="reference", **options).to_mask()

    kept, tie = selection.to_mask(), 1 + MASS_TIES[kind]
    if torch.equal(kept, reference()):
        return
    # What holds a little more than the share is kept, and nothing that holds a little less.
    missing, beyond = reference(tie) & ~kept, kept & ~reference(1 / tie)
    assert not missing.any(), f"(sequence, head, row, block) {missing.nonzero()[0].tolist()} is missing"
    assert not beyond.any(), f"(sequence, head, row, block) {beyond.nonzero()[0].tolist()} is kept"


def _assert_ranked(
    selection: BlockSelection,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Stem,
    prompt_len: int,
    scale: float | None,
    softcap: float | None,
    tie: float,
) -> None:
    """A row is right if the reference chooses it once all its scores are moved, by a tie, towards what was kept."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    num_blocks, kept, group = block_count(prompt_len, policy.block_size), selection.to_mask().cpu(), q.shape[2] // k.shape[2]
    q, k, v = (x.double().cpu() for x in (q, k, v))
    for b, h in product(range(q.shape[0]), range(q.shape[2])):
        magnitude = policy.beta * block_magnitude(v[b, :, h // group], policy)
        for i, row in enumerate(range(selection.grid.first_row, selection.grid.end_row)):
            scores = block_scores(q[b, :, h], k[b, :, h // group], row, policy, scale, softcap) + magnitude[: row + 1]
            mine, largest = kept[b, h, i, : row + 1], float(scores.abs().nan_to_num(0, 0, 0).max())
            moved = torch.where(mine, tie, -tie) * largest
            right, got = choose_row(scores + moved, row, num_blocks, policy), mine.nonzero().flatten().tolist()
            assert got == right, f"sequence {b}, head {h}, row {row} keeps {got} instead of {right}"


def assert_gradients(
    found: Sequence[Tensor],
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> None:
    """Assert that gradients of q, k, v and sinks are at most four times as wrong, against fp64, as those of the plain formulas.

    The formulas round where kernels must: the output, weights and the gradient of scores to the dtype of ``q``.
    """
    mask = token_mask(selection)
    inputs = [x.detach().double().requires_grad_() for x in (q, k, v, sinks) if x is not None]
    exact_out, _ = exact_attention(*inputs[:3], mask, sinks=inputs[3] if sinks is not None else None, softcap=softcap)
    exact = torch.autograd.grad(exact_out, inputs, d_out.double())
    plain = _plain_gradients(d_out, q, k, v, mask, sinks, softcap)
    longest = {name: x.double().norm(dim=-1).max() for name, x in zip("qkvo", (q, k, v, d_out), strict=True)}
    slope = longest["o"] * longest["v"] * math.sqrt(d_out[..., 0].numel())
    sizes = [q.shape[3] ** -0.5 * slope * longest["k"], q.shape[3] ** -0.5 * slope * longest["q"], 0.0, slope]
    for name, mine, its, right, size in zip(("q", "k", "v", "sinks"), found, plain, exact, sizes, strict=False):
        bound = 4 * (its.double() - right).norm() + GRADIENT_TIE * (size + right.norm())
        off = (mine.double() - right).norm()
        assert off <= bound, f"the gradient of {name} is off by {off:.2e} of {right.norm():.2e}, more than {bound:.2e}"


def _plain_gradients(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None, softcap: float | None
) -> list[Tensor]:
    dtype, wide, scale = q.dtype, torch.promote_types(q.dtype, torch.float32), q.shape[3] ** -0.5
    batch, _, heads, _ = q.shape
    queries, d_rows = (x.transpose(1, 2).to(wide) for x in (q, d_out))
    keys, values = (x.repeat_interleave(heads // k.shape[2], 2).transpose(1, 2).to(wide) for x in (k, v))
    scores, slope = queries @ keys.mT * scale, 1.0
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
        slope = 1 - (scores / softcap) ** 2
    scores = scores.masked_fill(~mask, -torch.inf)
    column = scores.new_full((batch, heads, len(scores[0, 0]), 1), -torch.inf)
    if sinks is not None:
        column = sinks.to(wide)[:, None, None].expand_as(column)
    weights = torch.cat([scores, column], 3).softmax(-1)
    weights, of_sink = weights[..., :-1], weights[..., -1:]
    rounded = weights.to(dtype).to(wide)
    delta = (d_rows * (rounded @ values).to(dtype).to(wide)).sum(-1, keepdim=True)
    d_scores = (scale * slope * weights * (d_rows @ values.mT - delta)).to(dtype).to(wide)
    d_keys, d_values = (x.unflatten(1, (k.shape[2], -1)).sum(2) for x in (d_scores.mT @ queries, rounded.mT @ d_rows))
    return [*(x.transpose(1, 2).to(dtype) for x in (d_scores @ keys, d_keys, d_values)), -(of_sink * delta).sum((0, 2, 3))]
