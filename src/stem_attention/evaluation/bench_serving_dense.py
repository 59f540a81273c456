"""Dense attention for chunks of prompts, on contiguous keys and values: what serving with Stem is timed against."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stem_attention.backends.dense import dense_attention
from stem_attention.evaluation.bench_peers import LeftOutError
from stem_attention.evaluation.bench_serving_batches import Load, Scenario, Step

Run = Callable[[], list[Tensor]]
"""Reads all steps; gives every step's output, ``(tokens, heads, dim)``."""

WHOLE = "cuDNN SDPA, prompts in one piece"


def dense_runs(load: Load, scenario: Scenario) -> dict[str, Callable[[], Run]]:
    """Dense contestants by name. On a GPU the fastest kernels that torch has for queries at the end of their keys.

    cuDNN's causal mask starts at the first key, whatever the lengths: it serves a chunk as two calls, over the cached keys
    and over the chunk's own, joined by their log-sum-exps. Where prompts are read whole it also reads each in one piece,
    which no server with chunks can do: a bound for what dense attention could reach.
    """
    if load.key_cache.device.type != "cuda":
        return {"dense SDPA": lambda: _each(load, _sdpa)}
    runs = {
        "Flash": lambda: _packed(load),
        "cuDNN SDPA, joined": lambda: _each(load, _cudnn),
    }
    return {**runs, WHOLE: lambda: _whole(load)} if scenario.whole else runs


def _each(load: Load, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Run:
    """Chunk by chunk, batch 1."""

    def run() -> list[Tensor]:
        outs = []
        for step in load.steps:
            parts = []
            for chunk, (low, high) in zip(step.chunks, pairwise(step.query_start_loc.tolist()), strict=True):
                k, v = (x[chunk.request][None, : chunk.high] for x in (load.keys, load.values))
                parts.append(attend(step.q[None, low:high], k, v)[0])
            outs.append(torch.cat(parts))
        return outs

    return run


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return dense_attention(q, k, v, q.shape[-1] ** -0.5)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    cached = k.shape[1] - q.shape[1]
    own = _cudnn_call(q, k[:, cached:], v[:, cached:], True)
    if cached == 0:
        return own[0].transpose(1, 2)
    before = _cudnn_call(q, k[:, :cached], v[:, :cached], False)
    share = torch.sigmoid(before[1] - own[1]).unsqueeze(-1)  # of the cached keys in the whole softmax
    return torch.lerp(own[0].float(), before[0].float(), share).to(q.dtype).transpose(1, 2)


def _cudnn_call(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Output ``(1, heads, q_len, dim)`` and log-sum-exp ``(1, heads, q_len)``."""
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, lse, *_ = attend(*(x.transpose(1, 2) for x in (q, k, v)), None, True, 0.0, causal)
    return out, lse.view(out.shape[:3])


def _packed(load: Load) -> Run:
    """FlashAttention as torch has it, every step in one launch; its causal mask ends at the last key."""
    packed = [
        tuple(torch.cat([x[chunk.request][: chunk.high] for chunk in step.chunks]) for x in (load.keys, load.values))
        for step in load.steps
    ]
    borders = [tuple(x.to(step.q.device) for x in (step.query_start_loc, step.seq_starts)) for step in load.steps]
    longest = [tuple(int(x.diff().max()) for x in (step.query_start_loc, step.seq_starts)) for step in load.steps]

    def run() -> list[Tensor]:
        attend = torch.ops.aten._flash_attention_forward
        return [
            attend(step.q, k, v, cu_q, cu_k, max_q, max_k, 0.0, True, False)[0]
            for step, (k, v), (cu_q, cu_k), (max_q, max_k) in zip(load.steps, packed, borders, longest, strict=True)
        ]

    return run


def _whole(load: Load) -> Run:
    """Every prompt in one call; the outputs are sorted into steps again, which costs no time worth counting."""
    prompts: list[list[Tensor]] = [[] for _ in load.keys]
    for step in load.steps:
        for chunk, part in zip(step.chunks, torch.split(step.q, step.query_start_loc.diff().tolist()), strict=True):
            prompts[chunk.request].append(part)
    queries = [torch.cat(parts) for parts in prompts]
    if any(len(q) != len(k) for q, k in zip(queries, load.keys, strict=True)):
        raise LeftOutError("the prompts are not read whole")

    def run() -> list[Tensor]:
        outs = []
        for q, k, v in zip(queries, load.keys, load.values, strict=True):
            heads_q, keys, values = (x[None].transpose(1, 2) for x in (q, k, v))
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                out = torch.nn.functional.scaled_dot_product_attention(heads_q, keys, values, is_causal=True, enable_gqa=True)
            outs.append(out[0].transpose(0, 1))
        return [_gather(step, outs) for step in load.steps]

    return run


def _gather(step: Step, outs: list[Tensor]) -> Tensor:
    return torch.cat([outs[chunk.request][chunk.low : chunk.high] for chunk in step.chunks])
