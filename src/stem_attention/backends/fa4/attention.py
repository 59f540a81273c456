"""The call of FlashAttention-4's block-sparse forward."""

from typing import Any

from cutlass import cute
from flash_attn.cute import flash_attn_func
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
from torch import Tensor

from stem_attention.backends.triton.attention import positive_scale
from stem_attention.call import Call
from stem_attention.selection import BlockSelection


@cute.jit
def causal(batch: Any, head: Any, query: Any, key: Any, lengths: Any, tensors: Any) -> Any:
    """Mask the future, with queries at the end of the keys; FlashAttention-4 asks for partial blocks alone."""
    return key <= query + (lengths.seqlen_k - lengths.seqlen_q)


def attend(call: Call, selection: BlockSelection) -> tuple[Tensor, Tensor]:
    """Compute attention over the kept blocks of a call that is not packed and whose first query begins a block.

    Returns as :meth:`stem_attention.backends.Backend.attend`.
    """
    q, scale = positive_scale(call.q, call.scale)
    out, lse = flash_attn_func(
        q, call.k, call.v, softmax_scale=scale, mask_mod=causal, return_lse=call.return_lse,
        block_sparse_tensors=BlockSparseTensorsTorch(**selection.to_fa4()),
    )  # fmt: skip
    return out, lse if call.return_lse else call.empty_lse()
