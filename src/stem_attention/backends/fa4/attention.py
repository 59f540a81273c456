"""The call of FlashAttention-4's block-sparse forward, in the form that each card's kernel reads."""

from functools import cache
from typing import Any

import torch
from cutlass import Int32, Uint32, cute
from flash_attn.cute import flash_attn_func
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
from flash_attn.cute.mask import r2p_bitmask_below
from torch import Tensor

from stem_attention.backends.fa4.lists import shared_lists
from stem_attention.backends.triton.attention import positive_scale
from stem_attention.call import Call
from stem_attention.selection import BlockSelection

# Queries and keys of a tile of the kernel for compute capability 10: two tiles of 128 queries read one list.
TILE = (256, 128)
_WORD = 32  # keys that its mask answers for at once


@cute.jit
def causal(batch: Any, head: Any, query: Any, key: Any, lengths: Any, tensors: Any) -> Any:
    """Mask the future, with queries at the end of the keys; FlashAttention-4 asks for partial blocks alone."""
    return key <= query + (lengths.seqlen_k - lengths.seqlen_q)


@cache
def kept_and_causal(block_size: int) -> Any:
    """Return a mask for shared lists, which looks up whether a query's own block row keeps a key's block.

    It answers for 32 keys of one query, which lie in one block, with a bit each.
    """

    @cute.jit
    def mask(batch: Any, head: Any, query: Any, key: Any, lengths: Any, tensors: Any) -> Any:
        q, k = query[0], key[0]
        kept = Int32(tensors[0][batch[0], head[0], q // block_size, k // block_size])
        seen = r2p_bitmask_below(q + (lengths.seqlen_k - lengths.seqlen_q) + 1 - k, 0)
        word = cute.make_rmem_tensor(1, Uint32)
        word[0] = seen * Uint32(kept)
        return word.load()

    mask.__vec_size__ = _WORD
    return mask


def attend(call: Call, selection: BlockSelection) -> tuple[Tensor, Tensor]:
    """Compute attention over the kept blocks of a call that is not packed and whose first query begins a block.

    Returns as :meth:`stem_attention.backends.Backend.attend`.
    """
    if torch.cuda.get_device_capability(call.q.device)[0] == 9:
        return _attend(call, selection.to_fa4(), mask_mod=causal)
    fields, kept = shared_lists(selection, *TILE)
    return _attend(call, fields, mask_mod=kept_and_causal(selection.block_size), aux_tensors=[kept])


def _attend(call: Call, fields: dict[str, Any], **mask: Any) -> tuple[Tensor, Tensor]:
    q, scale = positive_scale(call.q, call.scale)
    tensors = BlockSparseTensorsTorch(**fields)
    out, lse = flash_attn_func(
        q, call.k, call.v, softmax_scale=scale, return_lse=call.return_lse, block_sparse_tensors=tensors, **mask
    )
    return out, lse if call.return_lse else call.empty_lse()
