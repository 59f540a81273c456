"""Before the clock starts: is the result right?

Nothing here is as large as queries times keys, so that it runs at a million tokens too: a few query blocks, one head at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stem_attention.api import block_sparse_attention, select_blocks, stem_attention
from stem_attention.backends.reference import ReferenceBackend
from stem_attention.config import StemConfig
from stem_attention.policies.dense import keep_everything
from stem_attention.selection import BlockSelection
from stem_attention.testing import error_against_sdpa, worst_row_error

_CHECKED_ROWS = 3
# FlashAttention's own bound: at most twice what the same-precision dense attention loses against fp64. The floor is for
# inputs on which that happens to lose next to nothing.
_ERROR_FACTOR = 2.0
# Near ties may fall either way in fp32; of random inputs' blocks hardly any are that near.
_DIFFERENT_BLOCKS = 0.01
_TOKENS_AT_ONCE = 4096
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Check:
    """What a few query blocks, computed again, say.

    Attributes:
        rows: Query blocks compared.
        error: Worst relative row error against fp64 of Stem's two calls, the attention over a selection and the whole.
        dense_error: The same for torch's masked SDPA on the same blocks.
        different_blocks: Share of the kept blocks that the fp64 reference does not keep.
    """

    rows: int
    error: float
    dense_error: float
    different_blocks: float

    def problem(self, dtype: torch.dtype) -> str | None:
        """Why the result is not to be trusted, or None."""
        return _error_problem(self.error, self.dense_error, dtype) or _difference_problem(self.different_blocks)


def check(q: Tensor, k: Tensor, v: Tensor, config: StemConfig, seed: int = 0) -> Check:
    """Compute the last and a few random query blocks again in fp64.

    Attention is compared in every head, the selection in one query head of every key/value head.
    """
    selection = select_blocks(q, k, v, config=config)
    random = torch.Generator().manual_seed(seed)
    inner = torch.randint(selection.rows, (_CHECKED_ROWS - 1,), generator=random).tolist()
    rows = sorted({*inner, selection.rows - 1})
    outs = (
        block_sparse_attention(q, k, v, selection),
        stem_attention(q, k, v, config=replace(config, dense_below=0)),
    )
    errors = [_row_errors(out, q, k, v, rows_of(selection, row, row + 1)) for out in outs for row in rows]
    group = q.shape[2] // k.shape[2]
    heads = torch.arange(k.shape[2]) * group + torch.randint(group, (k.shape[2],), generator=random)
    # The z-score looks at the values of the whole prompt, which only the last block's slice holds.
    comparable = rows[-1:] if config.magnitude == "zscore" else rows
    differences = [_row_difference(q, k, v, selection, row, heads.to(q.device), config) for row in comparable]
    return Check(len(rows), *_worst(errors), max(differences))


def dense_problem(out: Tensor, q: Tensor, k: Tensor, v: Tensor, block_size: int) -> str | None:
    """What is wrong with a dense peer's result, judged by the last query block in fp64."""
    last = (k.shape[1] - 1) // block_size * block_size
    return _error_problem(*_row_errors(out, q, k, v, keep_everything(q[:, last:], k, block_size)), q.dtype)


def sparse_problem(out: Tensor, ours: Tensor, checked: Check) -> str | None:
    """What is wrong with a peer's attention over the same lists: it is compared with ours, which was checked, everywhere.

    Both may be as far from the truth as :class:`Check` allows, in opposite directions.
    """
    pairs = zip(*(torch.split(x, _TOKENS_AT_ONCE, 1) for x in (out, ours)), strict=True)
    difference = torch.tensor([worst_row_error(*pair) for pair in pairs]).max().item()
    allowed = 2 * _allowed_error(checked.dense_error, ours.dtype)
    return None if difference <= allowed else f"differs from Stem's by {difference:.2e}, allowed {allowed:.2e}"


def selection_problem(theirs: BlockSelection, ours: BlockSelection) -> str | None:
    """What is wrong with a peer's selection, compared with ours, which was checked."""
    return _difference_problem(differing_blocks(ours, theirs))


def differing_blocks(ours: BlockSelection, theirs: BlockSelection) -> float:
    """Share of the blocks that ``ours`` keeps and ``theirs`` does not."""
    differing = kept = 0
    for low in range(0, ours.rows, _ROWS_AT_ONCE):
        high = min(low + _ROWS_AT_ONCE, ours.rows)
        mine, other = (rows_of(selection, low, high).to_mask() for selection in (ours, theirs))
        differing += int((mine & ~other).sum())
        kept += int(mine.sum())
    return differing / kept


def rows_of(selection: BlockSelection, low: int, high: int) -> BlockSelection:
    """Query blocks ``[low, high)``, with keys up to their end, of a selection that has as many queries as keys."""
    end = min(high * selection.block_size, selection.kv_len)
    indices, counts = (x[:, :, low:high] for x in (selection.indices, selection.counts))
    return BlockSelection(indices, counts, selection.block_size, end - low * selection.block_size, end)


def _allowed_error(dense_error: float, dtype: torch.dtype) -> float:
    return max(_ERROR_FACTOR * dense_error, torch.finfo(dtype).eps)


def _error_problem(error: float, dense_error: float, dtype: torch.dtype) -> str | None:
    allowed = _allowed_error(dense_error, dtype)
    return None if error <= allowed else f"error {error:.2e} against fp64, allowed {allowed:.2e}"


def _difference_problem(share: float) -> str | None:
    if share <= _DIFFERENT_BLOCKS:
        return None
    return f"{share:.1%} of the kept blocks differ from the reference, allowed {_DIFFERENT_BLOCKS:.1%}"


def _worst(errors: list[tuple[float, float]]) -> tuple[float, float]:
    """The largest of both columns; unlike Python's own, torch's maximum does not lose a NaN."""
    error, dense_error = torch.tensor(errors, dtype=torch.float64).amax(0).tolist()
    return error, dense_error


def _row_errors(out: Tensor, q: Tensor, k: Tensor, v: Tensor, row: BlockSelection) -> tuple[float, float]:
    """Errors of ``out`` and of SDPA in a single query block, which ``row`` is."""
    queries, keys = slice(row.kv_len - row.q_len, row.kv_len), slice(0, row.kv_len)
    positions = torch.arange(row.kv_len, device=q.device)
    causal = positions <= positions[queries, None]
    kept, group = row.to_mask(), q.shape[2] // k.shape[2]
    errors = []
    for head in range(q.shape[2]):
        query, key = slice(head, head + 1), slice(head // group, head // group + 1)
        mask = kept[:, query].repeat_interleave(row.block_size, 3)[..., keys] & causal
        errors.append(error_against_sdpa(out[:, queries, query], q[:, queries, query], k[:, keys, key], v[:, keys, key], mask))
    return _worst(errors)


def _row_difference(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, row: int, heads: Tensor, config: StemConfig
) -> float:
    """Share of a query block's kept blocks that the fp64 reference does not keep. ``heads``: one of every kv head."""
    mine = rows_of(selection, row, row + 1)
    if config.head_factors is not None:
        config = replace(config, head_factors=(tuple(config.head_factors[0][head] for head in heads.tolist()),))
    # The estimate of mass is made from pools in the inputs' dtype, the published score from the inputs as they are.
    dtype = q.dtype if config.keep == "mass" else torch.float64
    queries = q[:, mine.kv_len - mine.q_len : mine.kv_len, heads].to(dtype)
    keys, values = (x[:, : mine.kv_len].to(dtype) for x in (k, v))
    reference = ReferenceBackend().select(queries, keys, values, config, q.shape[3] ** -0.5, k.shape[1])
    kept, wanted = mine.to_mask()[:, heads], reference.to_mask()
    return int((kept & ~wanted).sum()) / int(kept.sum())
