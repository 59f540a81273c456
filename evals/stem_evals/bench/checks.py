"""Before the clock starts: is the result right?

Nothing here is as large as queries times keys, so that it runs at a million tokens too: a few query blocks, one head at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stem_attention import BlockSelection, Mass, Policy, Stem, block_sparse_attention, select_blocks, stem_attention
from stem_attention.policies import Dense
from stem_attention.testing import error_against_sdpa, token_mask

_CHECKED_ROWS = 3
# FlashAttention's own bound: at most twice what the same-precision dense attention loses against fp64. The floor is for
# inputs on which that happens to lose next to nothing.
_ERROR_FACTOR = 2.0
# Near ties may fall either way in fp32; of random inputs' blocks hardly any are that near.
_DIFFERENT_BLOCKS = 0.01


class WrongResultError(Exception):
    """Stem's own result failed its check; there is nothing to time."""


@dataclass(frozen=True)
class Check:
    """Describe what a few query blocks, computed again, say.

    Attributes:
        rows: Query blocks compared.
        error: Worst relative row error against fp64.
        dense_error: The same for torch's masked SDPA on the same blocks.
        different_blocks: Share of the kept blocks that the policy in plain torch does not keep.
    """

    rows: int
    error: float
    dense_error: float
    different_blocks: float = 0.0

    def problem(self, dtype: torch.dtype) -> str | None:
        """Say why the result is not to be trusted; None if it is."""
        return _error_problem(self.error, self.dense_error, dtype) or difference_problem(self.different_blocks)

    def confirm(self, dtype: torch.dtype, where: str) -> None:
        """Raise WrongResultError if the result is not to be trusted."""
        problem = self.problem(dtype)
        if problem is not None:
            raise WrongResultError(f"wrong result at {where}: {problem}")


def check(q: Tensor, k: Tensor, v: Tensor, policy: Policy, seed: int = 0) -> Check:
    """Compute the last and a few random query blocks again: attention in fp64, the choice by the policy's own plain code."""
    selection = select_blocks(q, k, v, policy=policy)
    inner = torch.randint(selection.rows, (_CHECKED_ROWS - 1,), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = sorted({*inner, selection.rows - 1})
    outs = (block_sparse_attention(q, k, v, selection), stem_attention(q, k, v, policy=policy, dense_below=0))
    errors = [error for out in outs for row in rows for error in row_errors(out, q, k, v, selection, row)]
    # The z-score looks at the values of the whole prompt, which only the last block's slice holds.
    comparable = rows[-1:] if isinstance(policy, Stem) and policy.magnitude == "zscore" else rows
    differences = torch.tensor([_row_difference(q, k, v, selection, row, policy) for row in comparable])
    return Check(len(rows), *worst(errors), differences.max().item())


def dense_problem(out: Tensor, q: Tensor, k: Tensor, v: Tensor, block_size: int) -> str | None:
    """Say what is wrong with a dense peer's result, judged by the last query block in fp64; None if nothing is."""
    queries = slice((k.shape[1] - 1) // block_size * block_size, None)
    everything = Dense(block_size=block_size)(q[:, queries], k, v)
    return sparse_problem(out[:, queries], q[:, queries], k, v, everything)


def sparse_problem(out: Tensor, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection) -> str | None:
    """Say what is wrong with a peer's attention over a selection, judged by the last and a middle query block in fp64."""
    rows = {selection.rows // 2, selection.rows - 1}
    return _error_problem(*worst([error for row in rows for error in row_errors(out, q, k, v, selection, row)]), q.dtype)


def differing_blocks(ours: BlockSelection, theirs: BlockSelection) -> float:
    """Return the share of the blocks that ``ours`` keeps and ``theirs`` does not."""

    def listed(selection: BlockSelection) -> Tensor:
        """One number for every kept block."""
        row = torch.arange(selection.counts.numel(), device=selection.counts.device).view(*selection.counts.shape, 1)
        return (row * selection.key_blocks + selection.indices)[selection.indices >= 0]

    return 1 - torch.isin(listed(ours), listed(theirs), assume_unique=True).double().mean().item()


def difference_problem(share: float) -> str | None:
    """Say what is wrong with a selection of which this share of blocks differs from another's; None if nothing is."""
    if share <= _DIFFERENT_BLOCKS:
        return None
    return f"{share:.1%} of the kept blocks differ from the reference, allowed {_DIFFERENT_BLOCKS:.1%}"


def row_errors(out: Tensor, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, row: int) -> list[tuple[float, float]]:
    """Compute query block ``row`` of a selection again in fp64, one head at a time: at 128K tokens that needs room.

    Returns:
        Worst relative row errors of ``out`` and of torch's SDPA, head by head.
    """
    alone, queries = _one_row(selection, row)
    group, keys, errors = q.shape[2] // k.shape[2], slice(0, alone.kv_len), []
    for head in range(q.shape[2]):
        one, kv = slice(head, head + 1), slice(head // group, head // group + 1)
        mine = BlockSelection(alone.indices[:, one], alone.counts[:, one], alone.block_size, alone.q_len, alone.kv_len)
        tensors = out[:, queries, one], q[:, queries, one], k[:, keys, kv], v[:, keys, kv]
        errors.append(error_against_sdpa(*tensors, token_mask(mine)))
    return errors


def worst(errors: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the largest of both columns; unlike Python's own, torch's maximum does not lose a NaN."""
    error, dense_error = torch.tensor(errors, dtype=torch.float64).amax(0).tolist()
    return error, dense_error


def _one_row(selection: BlockSelection, row: int) -> tuple[BlockSelection, slice]:
    """One query block with keys up to its end, and where its queries lie among the selection's."""
    grid = selection.grid
    low, high = grid.row_positions(grid.first_row + row)
    indices, counts = (x[:, :, row : row + 1] for x in (selection.indices, selection.counts))
    alone = BlockSelection(indices, counts, selection.block_size, high - low, high)
    return alone, slice(low - grid.start, high - grid.start)


def _row_difference(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, row: int, policy: Policy) -> float:
    """Share of a query block's kept blocks that the policy in plain torch does not keep."""
    alone, queries = _one_row(selection, row)
    # The estimate of mass is made from pools in the inputs' dtype, other scores from the inputs as they are.
    dtype = q.dtype if isinstance(policy, Mass) else torch.float64
    tensors = (x.to(dtype) for x in (q[:, queries], k[:, : alone.kv_len], v[:, : alone.kv_len]))
    return differing_blocks(alone, policy(*tensors, prompt_len=k.shape[1]))


def _error_problem(error: float, dense_error: float, dtype: torch.dtype) -> str | None:
    allowed = max(_ERROR_FACTOR * dense_error, torch.finfo(dtype).eps)
    return None if error <= allowed else f"error {error:.2e} against fp64, allowed {allowed:.2e}"
