"""Stem: training-free sparse attention for long-context prefill (arXiv 2603.06274)."""

from stem_attention.api import block_sparse_attention, dense_limit, explain, select_blocks, stem_attention
from stem_attention.config import StemConfig
from stem_attention.errors import UnsupportedError
from stem_attention.selection import BlockSelection
from stem_attention.varlen import stem_attention_varlen

__version__ = "0.1.0"

__all__ = [
    "BlockSelection",
    "StemConfig",
    "UnsupportedError",
    "block_sparse_attention",
    "dense_limit",
    "explain",
    "select_blocks",
    "stem_attention",
    "stem_attention_varlen",
]
