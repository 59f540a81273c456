"""Soft caps, which bound scores smoothly: ``cap * tanh(score / cap)``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """The hyperbolic tangent, right to 1e-7."""
    return 1.0 - 2.0 / (tl.math.exp2(x * 2.8853900817779268) + 1.0)


@triton.jit
def capped(scores, cap):
    """Scores under a cap, which is None for none. In base 2 a score and a cap are both log2(e) times as large."""
    return scores if cap is None else cap * tanh(scores / cap)
