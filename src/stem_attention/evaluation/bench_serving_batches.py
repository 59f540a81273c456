"""Batches as vLLM runs them: requests at different stages of their prompts, keys in a paged cache behind a block table."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor

from stem_attention.config import StemConfig
from stem_attention.evaluation.bench_shapes import Shape
from stem_attention.policies.budget import block_count, row_budgets

PAGE_SIZE = 16


@dataclass(frozen=True)
class Chunk:
    """Tokens ``[low, high)`` of a request's prompt."""

    request: int
    low: int
    high: int


@dataclass(frozen=True)
class Scenario:
    """What a server is asked to do.

    Attributes:
        name: For tables.
        prompts: Tokens of every request's prompt.
        steps: The chunks that run together, step by step.
    """

    name: str
    prompts: tuple[int, ...]
    steps: tuple[tuple[Chunk, ...], ...]

    @property
    def tokens(self) -> int:
        """Prompt tokens that are read."""
        return sum(chunk.high - chunk.low for step in self.steps for chunk in step)

    @property
    def whole(self) -> bool:
        """Whether every prompt is read from its first to its last token."""
        return self.tokens == sum(self.prompts)

    def density(self, config: StemConfig, dense_limit: int) -> float:
        """Kept share of the causal block pairs; prompts under ``dense_limit`` tokens keep all."""
        kept = causal = 0
        for chunk in (chunk for step in self.steps for chunk in step):
            prompt = self.prompts[chunk.request]
            rows = range(chunk.low // config.block_size, block_count(chunk.high, config.block_size))
            budgets = row_budgets(config, block_count(prompt, config.block_size))
            causal += sum(row + 1 for row in rows)
            kept += sum(row + 1 if prompt < dense_limit else budgets[row] for row in rows)
        return kept / causal


def chunked_prefill(length: int, requests: int = 8) -> Scenario:
    """Prompts of equal length in four chunks each, every request a step further or back than its neighbour."""
    size = -(-length // 4)
    chunks = [
        (step + request % 4, Chunk(request, low, min(low + size, length)))
        for request in range(requests)
        for step, low in enumerate(range(0, length, size))
    ]
    chunks.sort(key=lambda item: item[0])  # stable: requests stay in order
    steps = tuple(tuple(chunk for _, chunk in run) for _, run in groupby(chunks, key=lambda item: item[0]))
    return Scenario(f"{requests} prompts of {length} in chunks of {size}", (length,) * requests, steps)


def mixed_step(longest: int, requests: int = 64, seed: int = 0) -> Scenario:
    """One step of requests whose prompts are ``longest / 128`` to ``longest`` tokens, each read up to a token of its own."""
    draw = torch.Generator().manual_seed(seed)
    shortest, size = max(1, longest // 128), max(1, longest // 64)
    shares = (torch.arange(requests) / max(1, requests - 1))[torch.randperm(requests, generator=draw)].tolist()
    prompts = tuple(round(shortest * (longest / shortest) ** share) for share in shares)
    ends = [
        max(1, round(prompt * end)) for prompt, end in zip(prompts, torch.rand(requests, generator=draw).tolist(), strict=True)
    ]
    step = tuple(Chunk(i, max(0, end - size), end) for i, end in enumerate(ends))
    return Scenario(f"{requests} prompts of {shortest} to {longest}, one step", prompts, (step,))


@dataclass(frozen=True)
class Step:
    """A step as vLLM's metadata give it, host copies included.

    Attributes:
        chunks: What it consists of.
        q: ``(tokens, heads, dim)``.
        query_start_loc: int32 ``(chunks + 1,)`` on the host.
        seq_starts: int32 ``(chunks + 1,)`` on the host, cumulated ``seq_lens``.
        block_table: int32 ``(chunks, max_pages)`` on the device.
        prompt_lens: Whole prompt length of every chunk's request.
    """

    chunks: tuple[Chunk, ...]
    q: Tensor
    query_start_loc: Tensor
    seq_starts: Tensor
    block_table: Tensor
    prompt_lens: list[int]


@dataclass(frozen=True)
class Load:
    """A scenario's tensors: keys and values of every request, contiguous and in the paged cache.

    Attributes:
        keys: Every request's, ``(tokens, kv_heads, dim)``.
        values: Likewise.
        key_cache: ``(pages, page_size, kv_heads, dim)``, a view of vLLM's layout: heads first, keys beside values.
        value_cache: Likewise.
        steps: The steps.
    """

    keys: list[Tensor]
    values: list[Tensor]
    key_cache: Tensor
    value_cache: Tensor
    steps: list[Step]


def build_load(scenario: Scenario, shape: Shape, seed: int) -> Load:
    """Draw a scenario's tensors, the same for the same seed on the same kind of device. Pages are scrambled."""
    draw = torch.Generator(shape.device).manual_seed(seed)

    def normal(tokens: int, heads: int) -> Tensor:
        return torch.randn((tokens, heads, shape.head_dim), generator=draw, dtype=shape.dtype, device=shape.device)

    read = [max(c.high for step in scenario.steps for c in step if c.request == i) for i in range(len(scenario.prompts))]
    keys, values = ([normal(length, shape.kv_heads) for length in read] for _ in range(2))
    pages = [math.ceil(length / PAGE_SIZE) for length in read]
    order = torch.randperm(sum(pages), generator=torch.Generator().manual_seed(seed)).to(shape.device)
    tables = list(torch.split(order, pages))
    fused = torch.zeros((sum(pages), shape.kv_heads, PAGE_SIZE, 2 * shape.head_dim), dtype=shape.dtype, device=shape.device)
    key_cache, value_cache = torch.split(fused.transpose(1, 2), shape.head_dim, -1)
    for table, k, v in zip(tables, keys, values, strict=True):
        for cache, x in ((key_cache, k), (value_cache, v)):
            whole = len(x) // PAGE_SIZE
            cache[table[:whole]] = x[: whole * PAGE_SIZE].view(whole, PAGE_SIZE, *x.shape[1:])
            if len(x) % PAGE_SIZE:
                cache[table[whole], : len(x) % PAGE_SIZE] = x[whole * PAGE_SIZE :]
    steps = [_metadata(step, scenario, tables, shape, normal) for step in scenario.steps]
    return Load(keys, values, key_cache, value_cache, steps)


def _metadata(
    chunks: tuple[Chunk, ...], scenario: Scenario, tables: list[Tensor], shape: Shape, normal: Callable[[int, int], Tensor]
) -> Step:
    q_lens, seq_lens = [c.high - c.low for c in chunks], [c.high for c in chunks]
    starts = [torch.tensor([0, *accumulate(lengths)], dtype=torch.int32) for lengths in (q_lens, seq_lens)]
    width = max(len(tables[c.request]) for c in chunks)
    block_table = torch.zeros((len(chunks), width), dtype=torch.int32, device=shape.device)
    for i, chunk in enumerate(chunks):
        block_table[i, : len(tables[chunk.request])] = tables[chunk.request]
    prompt_lens = [scenario.prompts[c.request] for c in chunks]
    return Step(chunks, normal(sum(q_lens), shape.heads), starts[0], starts[1], block_table, prompt_lens)
