"""Stem: training-free sparse attention for long-context prefill (arXiv 2603.06274)."""

from importlib.metadata import PackageNotFoundError, version

from stem_attention.api import block_sparse_attention, dense_limit, explain, select_blocks, stem_attention
from stem_attention.config import StemConfig
from stem_attention.errors import UnsupportedError
from stem_attention.selection import BlockSelection
from stem_attention.varlen import stem_attention_varlen

try:
    __version__ = version("stem-attention")
except PackageNotFoundError:  # run from the sources, without an install
    __version__ = "0+source"

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
