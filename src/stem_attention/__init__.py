"""Stem: training-free sparse attention for long-context prefill (arXiv 2603.06274)."""

from importlib.metadata import PackageNotFoundError, version

from stem_attention.api import block_sparse_attention, explain, select_blocks, stem_attention, stem_attention_varlen
from stem_attention.errors import UnsupportedError
from stem_attention.policies import Mass, Policy, Stem
from stem_attention.selection import BlockSelection

try:
    __version__ = version("stem-attention")
except PackageNotFoundError:  # run from the sources, without an install
    __version__ = "0+source"

__all__ = [
    "BlockSelection",
    "Mass",
    "Policy",
    "Stem",
    "UnsupportedError",
    "block_sparse_attention",
    "explain",
    "select_blocks",
    "stem_attention",
    "stem_attention_varlen",
]
