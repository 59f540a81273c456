"""Requests of an SGLang batch that take Stem, and where their keys lie. Reads the batch once, for all of its layers."""

from typing import Any

import torch
from torch import Tensor

from stem_attention.integrations.serving.counters import COUNTERS
from stem_attention.integrations.serving.rows import Row, SparseRows, first_reason, split
from stem_attention.integrations.serving.settings import Settings

_KEEP_ALL_BELOW = 1 << 30  # longer than any prompt: a call keeps every block


def read_rows(batch: Any) -> list[Row]:
    """Read the lengths of a prefill batch's requests.

    ``orig_seq_lens`` is the whole prompt's length also while it comes in chunks. It lies on the device: reading it waits for
    a copy, once a batch. Where a batch does without it (two-batch overlap), the tokens known so far stand in.
    """
    pairs = zip(batch.extend_seq_lens_cpu, batch.extend_prefix_lens_cpu, strict=True)
    whole = iter([] if batch.orig_seq_lens is None else batch.orig_seq_lens.tolist())
    return [Row(int(new), int(new) + int(cached), next(whole, 0)) for new, cached in pairs]  # 0: it only pads the batch


def plan(batch: Any, req_to_token: Tensor, settings: Settings, dense_below: int) -> list[tuple[SparseRows, int]]:
    """Split a ``ForwardBatch`` that is no decoding into what runs together, and count it.

    ``req_to_token``, int32 ``(requests, max_context_len)``, is the cache slot of every position of every request.

    Returns:
        The requests that take Stem and then, if there are any, the others, each with the length under which they keep every
        block; nothing where the dense backend runs the whole batch.
    """
    mode = batch.forward_mode
    obstacles = {
        # By SGLang's own definition: all but plain prefill and prefill mixed with decode.
        f"{mode.name.lower()} batch": not mode.is_context_parallel_extend(),
        "lengths known on the device only": batch.extend_seq_lens_cpu is None or batch.extend_prefix_lens_cpu is None,
        "encoder-decoder batch": batch.encoder_lens is not None,
        "several items in one prompt": batch.multi_item_delimiter_indices is not None,
    }
    rows = read_rows(batch) if (obstacle := first_reason(obstacles)) is None else []
    sparse, dense = split(rows, settings.min_query_len, dense_below)
    if not sparse:
        COUNTERS.dense_rows[obstacle or "short prompts and chunks"] += batch.batch_size
        return []
    COUNTERS.count_sparse([rows[i] for i in sparse])
    COUNTERS.dense_rows.update(dense.values())
    longest = max(row.kv_len for row in rows)
    slots = req_to_token[batch.req_pool_indices[: len(rows)].long(), :longest].to(torch.int32)
    parts = [(sparse, 0), (list(dense), _KEEP_ALL_BELOW)]
    return [(SparseRows.of(rows, chosen, slots, settings.policy), limit) for chosen, limit in parts if chosen]
