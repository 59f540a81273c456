"""Serve as a kernel that transformers loaded from a hub: ``attn_implementation="owner/name"``.

transformers then makes the masks that it makes for "sdpa", and says nothing of padding but in a full mask. So a prefill in one
go is sparse, and padded batches and continued prefills are dense; ``"stem"`` runs those sparse too.
"""

from typing import Any

import torch
from torch import Tensor

from stem_attention.integrations.transformers import attention_forward

supports_flash_attn = True
"""Mark the module, beside :func:`flash_attn_forward`, as a kernel that brings its own attention function, for transformers."""


def flash_attn_forward(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Run :func:`stem_attention.integrations.transformers.attention_forward` under the masks of "sdpa"."""
    if attention_mask is None and 1 < query.shape[2] < key.shape[2]:
        # "sdpa" goes without a mask here in one case, an empty static cache, and aligns the queries to its first keys.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    return attention_forward(module, query, key, value, attention_mask, **kwargs)
