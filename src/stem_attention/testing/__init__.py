"""Inputs and error measures for tests and benchmarks of attention; needs torch alone."""

from stem_attention.testing.errors import error_against_sdpa, exact_attention, relative_error, worst_row_error
from stem_attention.testing.inputs import LAYOUTS, make_qkv, random_selection, structured_qkv, token_mask

__all__ = [
    "LAYOUTS",
    "error_against_sdpa",
    "exact_attention",
    "make_qkv",
    "random_selection",
    "relative_error",
    "structured_qkv",
    "token_mask",
    "worst_row_error",
]
