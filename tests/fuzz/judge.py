"""Say whether a selection is right, by the reference alone: nothing here is shared with the code that made it."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from stem_attention import BlockSelection, Mass, Policy, Stem, select_blocks
from stem_attention.backends.reference.select import block_magnitude, block_scores, choose_row
from stem_attention.blocks import block_count

# Of the largest score of a row: scores are summed in fp32 on the CPU, from two bf16 numbers (16 bits) on a GPU.
SCORE_TIES = {"float64": 1e-12, "cpu": 1e-5, "cuda": 1e-3}
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
