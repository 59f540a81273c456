"""Requests of an SGLang batch that take Stem, and where their keys lie. Reads the batch once, for all of its layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stem_attention.integrations.serving.rows import Row, SparseRows


@dataclass(frozen=True)
class Step:
    """A batch in which some request takes Stem.

    Attributes:
        rows: All its requests.
        reasons: For each request why it is dense, or None.
        sparse: Those that take Stem.
        dense: The others, which keep every block, or None when there are none.
    """

    rows: tuple[Row, ...]
    reasons: tuple[str | None, ...]
    sparse: SparseRows
    dense: SparseRows | None


def batch_obstacle(batch: Any) -> str | None:
    """Tell why a whole ``ForwardBatch`` is left to the dense backend, or None."""
    mode = batch.forward_mode
    if not mode.is_context_parallel_extend():  # by SGLang's own definition: plain prefill, or prefill mixed with decode
        return f"{mode.name.lower()} batch"
    if batch.extend_seq_lens_cpu is None or batch.extend_prefix_lens_cpu is None:
        return "lengths known on the device only"
    if batch.encoder_lens is not None:
        return "encoder-decoder batch"
    return "several items in one prompt" if batch.multi_item_delimiter_indices is not None else None


def read_rows(batch: Any) -> tuple[Row, ...]:
    """Read the lengths of a prefill batch's requests.

    ``orig_seq_lens`` is the whole prompt's length also while it comes in chunks. It lies on the device: reading it waits for
    a copy, once a batch. Where a batch does without it (two-batch overlap), the tokens known so far stand in.
    """
    pairs = zip(batch.extend_seq_lens_cpu, batch.extend_prefix_lens_cpu, strict=True)
    lengths = [(int(new), int(new) + int(cached)) for new, cached in pairs]
    whole = [] if batch.orig_seq_lens is None else batch.orig_seq_lens.tolist()
    whole += [0] * (len(lengths) - len(whole))  # requests that only pad the batch
    return tuple(Row(q_len, kv_len, prompt) for (q_len, kv_len), prompt in zip(lengths, whole, strict=False))


def plan(batch: Any, req_to_token: Tensor, min_query_len: int, dense_below: int) -> Step | None:
    """Split a prefill batch; None when none of its requests takes Stem.

    Args:
        batch: SGLang's ``ForwardBatch`` without a :func:`batch_obstacle`.
        req_to_token: int32 ``(requests, max_context_len)``, the cache slot of every position of every request.
        min_query_len: Fewest tokens of a prompt in one batch that are worth a sparse call.
        dense_below: Prompts of fewer tokens are dense.
    """
    rows = read_rows(batch)
    reasons = tuple(row.dense_reason(min_query_len, dense_below) for row in rows)
    sparse = [i for i, reason in enumerate(reasons) if reason is None]
    if not sparse:
        return None
    dense = [i for i, reason in enumerate(reasons) if reason is not None and rows[i].q_len]
    longest = max(row.kv_len for row in rows)
    slots = req_to_token[batch.req_pool_indices[: len(rows)].long(), :longest].to(torch.int32)
    return Step(rows, reasons, SparseRows.of(rows, sparse, slots), SparseRows.of(rows, dense, slots) if dense else None)
