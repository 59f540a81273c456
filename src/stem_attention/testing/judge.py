"""What is wrong with a result: nothing here is shared with the kernels that made it."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from stem_attention.backends.reference.mass import row_masses
from stem_attention.config import StemConfig
from stem_attention.policies.budget import block_count, forced_count, scored_budget
from stem_attention.policies.stem import Stem
from stem_attention.selection import BlockSelection
from stem_attention.testing.errors import error_against_sdpa, exact_attention, worst_row_error
from stem_attention.testing.inputs import token_mask

# Of the largest score of a row: scores are summed in fp32 on the CPU, from two bf16 numbers (16 bits) on a GPU.
_TIE = {"cpu": 1e-5, "cuda": 1e-3}
# Of the least mass that is kept. A GPU sums pools in another order, so that a mean may round to the next bf16.
_MASS_TIE = {"cpu": 1e-3, "cuda": 5e-2}


def attention_faults(
    out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float | None = None
) -> list[str]:
    """Why ``out`` and ``lse`` are not attention over a selection, as sentences; none when they are.

    The worst row's error against fp64 may be four times that of torch's own attention in the same precision (in fp64
    1e-11), and a little for rows of one or two keys, where torch's is 0. Rows whose values nearly cancel make the worst row a
    matter of chance: among 3330 problems two came to 3.0 and 3.1 times.
    """
    if out.shape != q.shape or out.dtype != q.dtype:
        return [f"out is {out.dtype} {tuple(out.shape)}"]
    if not out.isfinite().all():
        return [f"{int((~out.isfinite()).sum())} of {out.numel()} numbers are not finite"]
    faults, mask = [], token_mask(selection)
    exact, exact_lse = exact_attention(q, k, v, mask, scale)
    if q.dtype == torch.float64:
        ours, bound = worst_row_error(out, exact), 1e-11
    else:
        ours, theirs = error_against_sdpa(out, q, k, v, mask, scale)
        bound = 4 * theirs + 2 * torch.finfo(q.dtype).eps
    if not ours <= bound:
        faults.append(f"the worst row is off by {ours:.2e}, more than {bound:.2e}")
    if lse is not None:
        worst = float((lse.double() - exact_lse).abs().div(1 + exact_lse.abs()).max()) if lse.numel() else 0.0
        if lse.shape != exact_lse.shape or not worst <= 2e-5:
            faults.append(f"lse {tuple(lse.shape)} is off by {worst:.2e}")
    return faults


def selection_faults(
    selection: BlockSelection, q: Tensor, k: Tensor, v: Tensor, config: StemConfig, prompt_len: int, scale: float | None = None
) -> list[str]:
    """Why a selection is not Stem's, as sentences: by the budgets and fp64 scores, or by the twin's masses, up to ties.

    Args:
        selection: What was selected.
        q: ``(batch, q_len, q_heads, dim)``, as the selection was made from, likewise ``k`` and ``v``.
        k: Keys.
        v: Values.
        config: What to keep.
        prompt_len: Tokens of the whole prompt.
        scale: Softmax scale.
    """
    selection.validate()
    if not selection.rows:
        return []
    kept, num_blocks = selection.to_mask(), block_count(prompt_len, config.block_size)
    if config.keep == "mass":
        return _mass_faults(kept, q, k, config, num_blocks, q.shape[3] ** -0.5 if scale is None else scale)
    policy, end = Stem(config), selection.first_row + selection.rows
    runs = policy.scores(
        q.double(), k.double(), v.double(), q.shape[3] ** -0.5 if scale is None else scale, selection.first_row, end
    )
    faults = []
    for first, scores in runs:
        for i in range(scores.shape[2]):
            mine = kept[:, :, first + i - selection.first_row, : first + i + 1]
            fault = _row_fault(mine, scores[:, :, i, : first + i + 1], first + i, num_blocks, config)
            if fault:
                faults.append(f"row {first + i}: {fault}")
    return faults


def _mass_faults(kept: Tensor, q: Tensor, k: Tensor, config: StemConfig, num_blocks: int, scale: float) -> list[str]:
    """Of ``kept (batch, heads, rows, key_blocks)``."""
    faults, first, group = [], (k.shape[1] - q.shape[1]) // config.block_size, q.shape[2] // k.shape[2]
    tie = 1 + _MASS_TIE.get(kept.device.type, 5e-2)
    for b, h, i in product(*map(range, kept.shape[:3])):
        row, mine, least = first + i, kept[b, h, i, : first + i + 1], config.head_share(h) / num_blocks
        blocks = torch.arange(row + 1, device=kept.device)
        always = (blocks < config.sink_blocks) | (blocks > row - config.local_blocks)
        if row >= num_blocks - config.tail_blocks:
            always = torch.ones_like(always)
        mass = row_masses(q[b, :, h], k[b, :, h // group], row, config, scale)
        if bool((always & ~mine).any()):
            faults.append(f"row {row}: a forced block is missing")
        elif bool((mine & ~always & (mass < least / tie)).any()):
            faults.append(f"row {row}: a kept block holds less than {least:.3e}")
        elif bool((~mine & (mass > least * tie)).any()):
            faults.append(f"row {row}: a dropped block holds more than {least:.3e}")
    return faults


def _row_fault(kept: Tensor, scores: Tensor, row: int, num_blocks: int, config: StemConfig) -> str | None:
    """Of one query block, ``kept`` and ``scores (batch, heads, row + 1)``."""
    if row >= num_blocks - config.tail_blocks:
        return None if bool(kept.all()) else "a row of the tail does not keep everything"
    blocks = torch.arange(row + 1, device=kept.device)
    forced = (blocks < config.sink_blocks) | (blocks > row - config.local_blocks)
    inside, wanted = config.forced == "inside", scored_budget(config, num_blocks, row)
    if not bool(kept[..., forced].all()):
        return "a forced block is missing"
    if inside:
        total = min(row + 1, max(wanted, forced_count(config, row)))
        if not bool((kept.sum(-1) == total).all()):
            return f"{sorted(set(kept.sum(-1).flatten().tolist()))} blocks are kept instead of {total}"
        wanted = total - int(forced.sum())
    free = scores[..., ~forced] if inside else scores
    tie = _TIE.get(kept.device.type, 1e-3) * float(scores.abs().nan_to_num(0, 0, 0).max()) + 1e-300
    if not 0 < wanted < free.shape[-1]:
        level = torch.full_like(scores[..., :1], torch.inf if wanted <= 0 else -torch.inf)
    else:
        level = free.topk(wanted, -1).values[..., -1:]
    candidates = ~forced
    if bool((kept & candidates & (scores < level - tie)).any()):
        return "a kept block scores less than one that is dropped"
    if bool((~kept & candidates & (scores > level + tie)).any()):
        return "a dropped block scores more than one that is kept"
    return None
