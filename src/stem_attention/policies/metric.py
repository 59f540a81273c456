"""Output-Aware Metric: how much a key block matters to a query block (paper, section 4).

    score[h, I, J] = route[h, I, J] + beta * magnitude[h // G, J]

``route`` is the mean of the strided antidiagonal scores of the block pair. A mean is linear, so it factorises: Q and K
are first summed into ``stride`` groups per block, then one block-level product of inner length ``stride * head_dim``
gives the same number as scoring every antidiagonal.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-6  # keeps the z-score variant's logarithm and division finite, as in the public code


def accumulator_dtype(x: Tensor) -> torch.dtype:
    """Scores of fp64 inputs stay fp64; everything else is accumulated in fp32 (in bf16 the ranking turns to noise)."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def group_sums(x: Tensor, start: int, block_size: int, stride: int) -> Tensor:
    """Sum the tokens of every block into ``stride`` groups of equal ``position % stride``.

    Args:
        x: ``(batch, length, heads, dim)``, token ``i`` at absolute position ``start + i``.
        start: Absolute position of the first token; it need not lie on a block border.
        block_size: Tokens per block.
        stride: Groups per block.

    Returns:
        ``(batch, heads, blocks, stride, dim)`` in fp32 (fp64 for fp64 input). Absent tokens add nothing.
    """
    length = x.shape[1]
    head = min(-start % block_size, length)
    whole = (length - head) // block_size * block_size
    pieces = [x[:, :head], x[:, head : head + whole], x[:, head + whole :]]
    # Only the two border blocks are ever padded; the body is summed in place through a view.
    pieces[0] = _pad(pieces[0], start % block_size, block_size) if head else pieces[0]
    pieces[2] = _pad(pieces[2], 0, block_size)
    sums = [
        torch.unflatten(piece, 1, (-1, block_size // stride, stride)).sum(2, dtype=accumulator_dtype(x))
        for piece in pieces
        if piece.shape[1]
    ]
    return torch.cat(sums, 1).permute(0, 3, 1, 2, 4)


def _pad(piece: Tensor, before: int, block_size: int) -> Tensor:
    after = -(before + piece.shape[1]) % block_size
    return torch.nn.functional.pad(piece, (0, 0, 0, 0, before, after)) if piece.shape[1] else piece


def block_max(x: Tensor, size: int) -> Tensor:
    """Largest value of each run of ``size`` along the last dimension; the last run may be shorter."""
    whole = x.shape[-1] // size * size
    body = torch.unflatten(x[..., :whole], -1, (-1, size)).amax(-1)
    return torch.cat([body, x[..., whole:].amax(-1, keepdim=True)], -1) if whole < x.shape[-1] else body


def magnitude(v: Tensor, kind: str, block_size: int, stride: int) -> Tensor:
    """The value term of every key block.

    Args:
        v: ``(batch, kv_len, kv_heads, dim)``.
        kind: ``"log"``, ``"zscore"`` or ``"none"``, see :class:`stem_attention.StemConfig`.
        block_size: Tokens per block.
        stride: Tokens per sub-block of the z-score variant.

    Returns:
        ``(batch, kv_heads, key_blocks)`` in fp32 (fp64 for fp64 input), never negative.
    """
    norm = torch.linalg.vector_norm(v, dim=-1, dtype=accumulator_dtype(v)).transpose(1, 2)
    if kind == "none":
        return torch.zeros_like(block_max(norm, block_size))
    if kind == "log":
        # The logarithm rises with its argument, so the largest logarithm is the logarithm of the largest norm.
        return block_max(norm, block_size).log().clamp(min=0)
    return zscore_magnitude(block_max(norm, stride), norm.shape[-1] // stride, block_size // stride)


def zscore_magnitude(peaks: Tensor, whole: int, per_block: int) -> Tensor:
    """The public code's value term from the largest norm of every sub-block.

    Args:
        peaks: ``(..., sub_blocks)``.
        whole: Sub-blocks that are complete; a cut-off one stays out of the statistics.
        per_block: Sub-blocks per block.

    Returns:
        ``(..., blocks)``.
    """
    log_norm = (peaks + _TINY).log()
    known = log_norm[..., : max(whole, 1)]
    spread = known.std(-1, keepdim=True) if known.shape[-1] > 1 else torch.zeros_like(known)
    z = ((log_norm - known.mean(-1, keepdim=True)) / (spread + _TINY)).clamp(min=0)
    padded = torch.nn.functional.pad(z, (0, -z.shape[-1] % per_block))
    return torch.unflatten(padded, -1, (-1, per_block)).mean(-1)
