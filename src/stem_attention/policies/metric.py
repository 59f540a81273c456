"""Output-Aware Metric: how much a key block matters to a query block (paper, section 4).

    score[h, I, J] = route[h, I, J] + beta * magnitude[h // G, J]

``route`` is the mean of the strided antidiagonal scores of the block pair. A mean is linear, so it factorises: Q and K
are first summed into ``stride`` groups per block, then one block-level product of inner length ``stride * head_dim``
gives the same number as scoring every antidiagonal.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

_TINY = 1e-6  # keeps the z-score variant's logarithm and division finite, as in the public code


def accumulator_dtype(x: Tensor) -> torch.dtype:
    """Scores of fp64 inputs stay fp64; everything else is accumulated in fp32 (in bf16 the ranking turns to noise)."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def exact_dtype(x: Tensor) -> torch.dtype:
    """Products are taken in fp64 where it is cheap, on a CPU.

    A product's rounding depends on its shape, and a chunk of a prompt has another shape than the whole. In fp64 a chunk
    scores as the whole does, and scores that are equal stay equal.
    """
    return torch.float64 if x.device.type == "cpu" else accumulator_dtype(x)


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Bound scores as a soft cap does: ``softcap * tanh(scores / softcap)``; None is no bound."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def grouped_product(queries: Tensor, keys: Tensor) -> Tensor:
    """Multiply ``(batch, q_heads, rows, dim)`` by each head's keys, ``(batch, kv_heads, columns, dim)``, to rows x columns."""
    grouped = torch.unflatten(queries, 1, (keys.shape[1], -1))
    return torch.unflatten(grouped.flatten(2, 3) @ keys.mT, 2, grouped.shape[2:4]).flatten(1, 2)


def runs(x: Tensor, start: int, block_size: int, size: int) -> Tensor:
    """Cut whole blocks into runs of ``size`` tokens: ``(batch, runs, size, heads, dim)``; absent tokens are zero.

    ``x`` is ``(batch, length, heads, dim)``, its first token at position ``start``, on a block border or not.
    """
    before, after = start % block_size, -(start + x.shape[1]) % block_size
    padded = pad(x, (0, 0, 0, 0, before, after)) if before or after else x
    return torch.unflatten(padded, 1, (-1, size))


def group_sums(x: Tensor, start: int, block_size: int, stride: int) -> Tensor:
    """Sum the tokens of every block into ``stride`` groups of equal ``position % stride``; ``x`` as for :func:`runs`.

    Returns ``(batch, heads, blocks, stride, dim)`` in fp32 (fp64 for fp64 input).
    """
    groups = torch.unflatten(runs(x, start, block_size, stride), 1, (-1, block_size // stride))
    return groups.sum(2, dtype=accumulator_dtype(x)).permute(0, 3, 1, 2, 4)


def block_max(x: Tensor, size: int) -> Tensor:
    """Largest value of each run of ``size`` along the last dimension; the last run may be shorter."""
    return torch.unflatten(pad(x, (0, -x.shape[-1] % size), value=-torch.inf), -1, (-1, size)).amax(-1)


def magnitude(v: Tensor, kind: str, block_size: int, stride: int) -> Tensor:
    """Work out the value term of every key block, as :class:`stem_attention.Stem` describes each ``kind`` but ``"none"``.

    ``v`` is ``(batch, kv_len, kv_heads, dim)``; the z-score variant cuts blocks into sub-blocks of ``stride`` tokens. Returns
    ``(batch, kv_heads, key_blocks)`` in fp32 (fp64 for fp64 input), never negative.
    """
    norm = torch.linalg.vector_norm(v, dim=-1, dtype=accumulator_dtype(v)).transpose(1, 2)
    if kind == "log":
        # The logarithm rises with its argument, so the largest logarithm is the logarithm of the largest norm.
        return block_max(norm, block_size).log().clamp(min=0)
    return zscore_magnitude(block_max(norm, stride), norm.shape[-1] // stride, block_size // stride)


def zscore_magnitude(peaks: Tensor, whole: int, per_block: int) -> Tensor:
    """Work out the public code's value term ``(..., blocks)`` from the largest norms ``(..., sub_blocks)``.

    Of the sub-blocks, ``per_block`` a block, the first ``whole`` are complete; a cut-off one stays out of the statistics.
    """
    log_norm = (peaks + _TINY).log()
    known = log_norm[..., : max(whole, 1)]
    spread = known.std(-1, keepdim=True) if known.shape[-1] > 1 else torch.zeros_like(known)
    z = ((log_norm - known.mean(-1, keepdim=True)) / (spread + _TINY)).clamp(min=0)
    return torch.unflatten(pad(z, (0, -z.shape[-1] % per_block)), -1, (-1, per_block)).mean(-1)
