"""Inputs, error measures and packed batches for tests of a policy or a kernel; needs torch alone."""

from stem_attention.testing.errors import assert_accurate, error_against_sdpa, exact_attention, relative_error, worst_row_error
from stem_attention.testing.inputs import LAYOUTS, make_qkv, random_selection, structured_qkv, token_mask
from stem_attention.testing.packed import borders, pack, to_pages

__all__ = [
    "LAYOUTS",
    "assert_accurate",
    "borders",
    "error_against_sdpa",
    "exact_attention",
    "make_qkv",
    "pack",
    "random_selection",
    "relative_error",
    "structured_qkv",
    "to_pages",
    "token_mask",
    "worst_row_error",
]
