"""What the fixed patterns share: from a rule over block positions to a BlockSelection."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stem_attention.errors import bad_argument
from stem_attention.selection import BlockSelection

# (rows (rows, 1), columns (columns,)), both absolute block ids, to a bool mask (rows, columns) or (heads, rows, columns).
Rule = Callable[[Tensor, Tensor], Tensor]


def select_by_rule(q: Tensor, k: Tensor, block_size: int, rule: Rule) -> BlockSelection:
    """Keep the causal blocks that ``rule`` keeps, and the diagonal.

    Args:
        q: ``(batch, q_len, q_heads, dim)``; just its shape and device are read.
        k: ``(batch, kv_len, kv_heads, dim)``; just its shape is read.
        block_size: Tokens per block.
        rule: What to keep; it may say anything about blocks after the diagonal.
    """
    (batch, q_len, heads, _), kv_len = q.shape, k.shape[1]
    columns = torch.arange(-(-kv_len // block_size), device=q.device)
    rows = columns[(kv_len - q_len) // block_size :, None] if q_len else columns[:0, None]
    mask = (rule(rows, columns) & (columns <= rows)) | (columns == rows)
    mask = mask if mask.dim() == 3 else mask[None]
    one = BlockSelection.from_mask(mask[None], block_size=block_size, q_len=q_len, kv_len=kv_len)
    # The pattern is sorted once and then repeated, as it is the same for every sequence and often for every head.
    indices = one.indices.expand(batch, heads, -1, -1).contiguous()
    return BlockSelection(indices, one.counts.expand(batch, heads, -1).contiguous(), block_size, q_len, kv_len)


def check_counts(policy: object, **least: int) -> None:
    """Check that each named field of ``policy`` is an integer of at least the given value.

    Raises:
        ValueError: It is not; the message names the field.
    """
    for name, smallest in least.items():
        value = getattr(policy, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
            raise bad_argument(name, f"an integer >= {smallest}", repr(value), f"pass {name}={max(smallest, 1)} or more")
