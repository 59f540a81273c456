"""Batches as vLLM runs them: requests at different stages of their prompts, keys in a paged cache behind a page table."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stem_attention.testing.packed import borders, to_pages
from stem_evals.bench.setup import Setup

PAGE_SIZE = 16


@dataclass(frozen=True)
class Chunk:
    """Tokens ``[low, high)`` of a request's prompt."""

    request: int
    low: int
    high: int


@dataclass(frozen=True)
class Scenario:
    """Describe what a server is asked to do.

    Attributes:
        name: For tables.
        prompts: Tokens of every request's prompt.
        steps: The chunks that run together, step by step.
    """

    name: str
    prompts: tuple[int, ...]
    steps: tuple[tuple[Chunk, ...], ...]


def chunked_prefill(length: int, requests: int = 8) -> Scenario:
    """Prompts of equal length in four chunks each, every request a step further or back than its neighbour."""
    size = -(-length // 4)
    steps: dict[int, list[Chunk]] = {}
    for request in range(requests):
        for step, low in enumerate(range(0, length, size)):
            steps.setdefault(step + request % 4, []).append(Chunk(request, low, min(low + size, length)))
    ordered = tuple(tuple(steps[step]) for step in sorted(steps))
    return Scenario(f"{requests} prompts of {length} in chunks of {size}", (length,) * requests, ordered)


def mixed_step(longest: int, requests: int = 64, seed: int = 0) -> Scenario:
    """One step of requests whose prompts are ``longest / 128`` to ``longest`` tokens, each read up to a token of its own."""
    draw = torch.Generator().manual_seed(seed)
    shortest, size = max(1, longest // 128), max(1, longest // 64)
    shares = (torch.arange(requests) / max(1, requests - 1))[torch.randperm(requests, generator=draw)].tolist()
    prompts = tuple(round(shortest * (longest / shortest) ** share) for share in shares)
    read = torch.rand(requests, generator=draw).tolist()
    ends = [max(1, round(prompt * share)) for prompt, share in zip(prompts, read, strict=True)]
    step = tuple(Chunk(i, max(0, end - size), end) for i, end in enumerate(ends))
    return Scenario(f"{requests} prompts of {shortest} to {longest}, one step", prompts, (step,))


@dataclass(frozen=True)
class Part:
    """One chunk's queries and its contiguous keys and values up to its end, ``(1, length, heads, dim)`` each."""

    q: Tensor
    k: Tensor
    v: Tensor
    prompt_len: int


@dataclass(frozen=True)
class Step:
    """A step's tensors, twice: as arguments of :func:`stem_attention.stem_attention_varlen`, and chunk by chunk.

    Attributes:
        packed: Queries, the caches of keys and values (vLLM's layout: heads first, keys beside values), int32 borders on the
            host and the longest chunk of queries and of keys.
        page_table: int32 ``(chunks, max_pages)`` on the device.
        parts: Its chunks.
    """

    packed: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, int]
    page_table: Tensor
    parts: list[Part]


def build_steps(scenario: Scenario, setup: Setup) -> list[Step]:
    """Draw a scenario's tensors, the same for the same seed on the same kind of device. Pages are scrambled."""
    draw, heads = torch.Generator(setup.device).manual_seed(setup.seed), setup.heads

    def normal(tokens: int, count: int) -> Tensor:
        return torch.randn((tokens, count, heads.head_dim), generator=draw, dtype=setup.dtype, device=setup.device)

    read = [max(c.high for step in scenario.steps for c in step if c.request == i) for i in range(len(scenario.prompts))]
    keys, values = (normal(sum(read), heads.kv_heads) for _ in range(2))
    (key_pages, table), (value_pages, _) = (to_pages(x, read, PAGE_SIZE, 0.0) for x in (keys, values))
    both = torch.cat([key_pages, value_pages], -1).transpose(1, 2).contiguous().transpose(1, 2)
    key_cache, value_cache = torch.split(both, heads.head_dim, -1)
    contiguous = torch.split(keys, read), torch.split(values, read)
    steps = []
    for chunks in scenario.steps:
        q_lens, k_lens = [chunk.high - chunk.low for chunk in chunks], [chunk.high for chunk in chunks]
        q = normal(sum(q_lens), heads.heads)
        parts = []
        for chunk, mine in zip(chunks, torch.split(q, q_lens), strict=True):
            k, v = (x[chunk.request][None, : chunk.high] for x in contiguous)
            parts.append(Part(mine[None], k, v, scenario.prompts[chunk.request]))
        packed = (q, key_cache, value_cache, borders(q_lens), borders(k_lens), max(q_lens), max(k_lens))
        steps.append(Step(packed, table[[chunk.request for chunk in chunks]], parts))
    return steps
