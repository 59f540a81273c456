"""Problems as hypothesis strategies: every shape, dtype, layout, policy and way to call that the library promises to take.

The first choice of each strategy is its simplest, so that a failure shrinks to a short prompt, few heads and no knobs.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from stem_attention import Mass, Policy, Stem
from stem_attention.policies import (
    BigBird,
    Dense,
    FlashPrefillTopK,
    Longformer,
    Oracle,
    SinkWindow,
    Strided,
    XAttention,
    XAttentionTopK,
)
from stem_attention.testing import LAYOUTS, make_qkv, structured_qkv

from .poison import surrounded

PRIMES = (2, 3, 5, 7, 13, 31, 61, 127, 131, 257, 509, 1021, 2039, 2053, 3001, 4093, 4999)
LOUDEST_HALF = 30000.0  # structured values are drawn beyond fp16's 65504 now and then


@dataclass(frozen=True)
class Space:
    """What problems are drawn from."""

    head_dims: tuple[int, ...] = (16, 17, 24, 40, 64, 80, 96, 128, 192, 256)
    groups: tuple[int, ...] = tuple(range(1, 17))
    block_sizes: tuple[int, ...] = (16, 32, 48, 64, 128)
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16", "float64")
    value_dims: tuple[int | None, ...] = (None, None, 16, 40, 128)
    page_sizes: tuple[int, ...] = (1, 7, 16, 64, 256)
    longest: int = 5000
    work: int = 1 << 18
    """Most pairs of a query and a key over all heads and sequences, which bounds time and memory."""
    presets: bool = False
    """Draw policies with fast selection from a few, where each new one costs a compilation."""


@dataclass(frozen=True)
class Problem:
    """One call, small enough to print: the same problem gives the same numbers everywhere."""

    lengths: tuple[tuple[int, int], ...]
    """``(q_len, kv_len)`` of every sequence; they are all the same unless the batch is packed."""
    kv_heads: int
    group: int
    head_dim: int
    value_dim: int | None
    dtype: str
    layout: str
    dense_below: int
    prompt_extra: int
    """Tokens of the prompt that are still to come."""
    density: float
    """Of random lists."""
    page_size: int
    """0: keys are packed too."""
    return_lse: bool
    structured: bool
    surrounded: bool
    poisoned: bool
    """New memory is NaN while the library runs."""
    seed: int
    policy: Policy
    with_sinks: bool
    softcap: float | None
    window: int | None
    """Of attention over random lists."""

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.group

    def extra(self, device: str) -> dict[str, Any]:
        """What attention has beside plain scores, as arguments of a call."""
        drawn = torch.randn(self.heads, generator=torch.Generator().manual_seed(self.seed))
        return {"softcap": self.softcap, "sinks": (4 * drawn).to(device) if self.with_sinks else None}

    def qkv(self, device: str, sequence: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Tensors of the whole batch, or of one sequence of a packed one."""
        batch, at = (len(self.lengths), 0) if sequence is None else (1, sequence)
        dtype, (q_len, kv_len), seed = getattr(torch, self.dtype), self.lengths[at], self.seed + at
        make = structured_qkv if self.structured else make_qkv
        sizes = batch, q_len, kv_len, self.heads, self.kv_heads, self.head_dim
        q, k, v = make(*sizes, dtype, device, seed, self.layout, value_dim=self.value_dim)
        if dtype == torch.float16:
            v.clamp_(-LOUDEST_HALF, LOUDEST_HALF)
        return (surrounded(q), surrounded(k), surrounded(v)) if self.surrounded else (q, k, v)


@st.composite
def problems(draw: st.DrawFn, space: Space, packed: bool = False) -> Problem:
    """A call with sequences of one length, or a packed batch of any lengths, empty ones among them."""
    block = draw(st.sampled_from(space.block_sizes))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from(space.groups[:2]) | st.sampled_from(space.groups))
    sequences = draw(st.integers(1, 5) if packed else st.sampled_from((1, 1, 2, 3)))
    one = lengths(space, block, space.work // (sequences * kv_heads * group))
    if packed:
        empty = st.tuples(st.just(0), st.sampled_from((0, 40)))
        spans = tuple(draw(st.one_of(one, one, one, empty)) for _ in range(sequences))
    else:
        spans = (draw(one),) * sequences
    return Problem(
        lengths=spans,
        kv_heads=kv_heads,
        group=group,
        head_dim=draw(st.sampled_from(space.head_dims)),
        value_dim=draw(st.sampled_from(space.value_dims)),
        dtype=draw(st.sampled_from(space.dtypes)),
        layout=draw(st.sampled_from(LAYOUTS)),
        dense_below=draw(st.sampled_from((0, 0, 0, 300))),
        prompt_extra=draw(st.sampled_from((0, 0, 1, block, 3 * block + 5, 2000))),
        density=draw(st.sampled_from((0.4, 0.0, 0.1, 1e9))),
        page_size=draw(st.sampled_from((0, *space.page_sizes))) if packed else 0,
        return_lse=draw(st.booleans()),
        structured=draw(st.booleans()),
        surrounded=draw(st.booleans()),
        poisoned=draw(st.booleans()),
        seed=draw(st.integers(0, 1 << 30)),
        policy=draw(policies(space, block, kv_heads * group)),
        with_sinks=draw(st.sampled_from((False, False, True))),
        softcap=draw(st.sampled_from((None, None, 30.0, 2.0))),
        window=draw(st.sampled_from((None, None, None, 1, block, 3 * block + 5, 700))),
    )


@st.composite
def lengths(draw: st.DrawFn, space: Space, block: int, pairs: int) -> tuple[int, int]:
    """Any length, a prime, or a neighbour of a block border; as many queries as the work allows."""
    many_queries = draw(st.integers(0, 3)) < 3
    longest = max(1, min(space.longest, isqrt(pairs) if many_queries else pairs))
    borders = st.builds(lambda n, beside: n * block + beside, st.integers(1, 1 + longest // block), st.sampled_from((0, -1, 1)))
    kv_len = min(longest, draw(st.one_of(st.integers(1, longest), borders, borders, st.sampled_from(PRIMES))))
    fewer = st.one_of(st.integers(1, kv_len), st.just(max(1, kv_len - block)))
    q_len = draw(st.one_of(st.just(kv_len), st.just(kv_len), fewer))
    return min(q_len, max(1, pairs // kv_len)), kv_len


def policies(space: Space, block: int, heads: int) -> st.SearchStrategy[Policy]:
    """The two rules with selection of their own twice as often as all that run their own code."""
    size = {"block_size": st.just(block)}
    if space.presets:
        stem = st.sampled_from([make(block_size=block) for make in (Stem, Stem.paper, Stem.angelslim)])
        mass = st.builds(Mass, key_pool=st.sampled_from((32, 16)), head_factors=factors(heads), **size)
    else:
        stem, mass = stems(block), masses(block, heads)
    few, more = st.integers(0, 3), st.integers(1, 4)
    others = st.one_of(
        st.builds(Dense, **size),
        st.builds(SinkWindow, sink_blocks=few, window_blocks=more, **size),
        st.builds(Strided, window_blocks=more, stride_blocks=more, **size),
        st.builds(Longformer, window_blocks=more, global_blocks=few, tail_blocks=few, **size),
        st.builds(BigBird, window_blocks=more, global_blocks=few, random_blocks=few, seed=few, **size),
        st.builds(XAttention, stride=divisors(block), threshold=st.sampled_from((0.9, 0.3, 1.0)), **size),
        st.builds(_ranked, st.sampled_from((Oracle, FlashPrefillTopK)), budgets(block)),
        st.builds(_ranked, st.just(XAttentionTopK), budgets(block), stride=divisors(block)),
    )
    return st.sampled_from((stem, mass, stem, mass, others)).flatmap(lambda strategy: strategy)


def divisors(block: int) -> st.SearchStrategy[int]:
    """Of the block size: what a stride or a pool may be."""
    return st.sampled_from([size for size in range(1, block + 1) if block % size == 0])


def factors(heads: int) -> st.SearchStrategy[tuple[tuple[float, ...]] | None]:
    """None, or a share of its own for each head: a few, in turn."""
    few = st.lists(st.sampled_from((1.0, 0.1, 0.5, 1.7, 4.0)), min_size=1, max_size=5)
    return st.none() | few.map(lambda own: (tuple(own[head % len(own)] for head in range(heads)),))


def masses(block: int, heads: int) -> st.SearchStrategy[Mass]:
    """Keep by mass with any fields."""
    return st.builds(
        Mass,
        share=st.sampled_from((1.0, 0.1, 3.0, 10.0)),
        spread=st.sampled_from((0.5, 0.0, 0.1, 2.0)),
        query_pool=divisors(block),
        key_pool=divisors(block),
        head_factors=factors(heads),
        block_size=st.just(block),
        **ends(),
    )


def stems(block: int) -> st.SearchStrategy[Stem]:
    """Stem with any fields."""
    return st.builds(
        _ranked,
        st.just(Stem),
        budgets(block),
        stride=divisors(block),
        beta=st.sampled_from((0.2, 0.0, 1.0)),
        magnitude=st.sampled_from(("log", "log", "zscore", "none")),
    )


def ends() -> dict[str, st.SearchStrategy[int]]:
    """Blocks that every row keeps, and rows that keep every block."""
    numbers = {"sink_blocks": (1, 0, 4), "local_blocks": (1, 2, 4), "tail_blocks": (1, 0, 2)}
    return {name: st.sampled_from(values) for name, values in numbers.items()}


def budgets(block: int) -> st.SearchStrategy[dict[str, object]]:
    """Fields of policies that rank; ``ratio_long`` as a share of ``ratio_short``."""
    return st.fixed_dictionaries(
        {
            "block_size": st.just(block),
            "decay": st.sampled_from((0.7, 0.3, 1.0)),
            "schedule": st.sampled_from(("smooth", "step", "angelslim")),
            "ratio_short": st.sampled_from((0.2, 0.05, 0.5, 1.0)),
            "ratio_long": st.sampled_from((1.0, 0.5)),
            "knee_tokens": st.sampled_from((1000, 200, 16384)),
            "min_blocks": st.sampled_from((None, 1, 4)),
            "forced": st.sampled_from(("inside", "inside", "extra")),
            **ends(),
        }
    )


def _ranked(policy: type[Policy], budget: dict[str, float], **fields: object) -> Policy:
    return policy(**{**budget, "ratio_long": budget["ratio_short"] * budget["ratio_long"]}, **fields)
