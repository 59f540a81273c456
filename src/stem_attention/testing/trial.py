"""Run one random problem on a backend, and say what is wrong with what comes back."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from stem_attention.api import block_sparse_attention, select_blocks, stem_attention
from stem_attention.policies.dense import keep_everything
from stem_attention.testing.inputs import make_qkv, random_selection, structured_qkv
from stem_attention.testing.judge import attention_faults, selection_faults
from stem_attention.testing.packed import borders, to_pages
from stem_attention.testing.poison import new_memory_is_nan, surrounded
from stem_attention.testing.problems import Problem, torch_dtype
from stem_attention.varlen import stem_attention_varlen

Inputs = tuple[Tensor, Tensor, Tensor]

_LOUDEST_HALF = 30000.0  # structured values are drawn beyond fp16's 65504 now and then


@dataclass(frozen=True)
class Place:
    """Where a problem runs: a backend's name, and a device.

    Attributes:
        backend: As in :func:`stem_attention.stem_attention`.
        device: Of the tensors.
        poisoned: Fill new memory with NaN while the library runs.
    """

    backend: str
    device: str = "cpu"
    poisoned: bool = True

    def running(self) -> AbstractContextManager[None]:
        """Around each call of the library."""
        return new_memory_is_nan() if self.poisoned else nullcontext()


def run_problem(problem: Problem, place: Place) -> list[str]:
    """What is wrong with the results, as sentences; nothing is, if there are none. Inputs must come back as they were."""
    run = {"lists": _lists, "whole": _whole, "chunks": _chunks, "packed": _packed}[problem.kind]
    sequences = problem.lengths if problem.kind == "packed" else problem.lengths[:1]
    made = [_inputs(problem, i, place) for i in range(len(sequences))]
    before = [[x.clone() for x in qkv] for qkv in made]
    faults = run(problem, place, made)
    if not all(torch.equal(x, y) for old, new in zip(before, made, strict=True) for x, y in zip(old, new, strict=True)):
        faults.append("an input was written to")
    return faults


def _inputs(problem: Problem, i: int, place: Place) -> Inputs:
    make = structured_qkv if problem.structured else make_qkv
    q_len, kv_len = problem.lengths[i]
    batch = 1 if problem.kind == "packed" else len(problem.lengths)
    heads = problem.kv_heads * problem.group
    q, k, v = make(
        batch, q_len, kv_len, heads, problem.kv_heads, problem.head_dim, torch_dtype(problem), place.device,
        problem.seed + i, problem.layout,
    )  # fmt: skip
    if q.dtype == torch.float16:
        v.clamp_(-_LOUDEST_HALF, _LOUDEST_HALF)
    if problem.surrounded:
        return surrounded(q), surrounded(k), surrounded(v)
    return q, k, v


def _lists(problem: Problem, place: Place, made: list[Inputs]) -> list[str]:
    """Attention over random lists."""
    ((q, k, v),) = made
    selection = random_selection(
        q.shape[0], q.shape[2], q.shape[1], k.shape[1], problem.config.block_size, problem.density, place.device, problem.seed
    )
    with place.running():
        result = block_sparse_attention(q, k, v, selection, return_lse=problem.return_lse, backend=place.backend)
    out, lse = result if isinstance(result, tuple) else (result, None)
    return attention_faults(out, lse, q, k, v, selection)


def _whole(problem: Problem, place: Place, made: list[Inputs]) -> list[str]:
    """Selection and attention in one call."""
    return _judged(*made[0], problem, place, made[0][1].shape[1] + problem.prompt_extra)


def _chunks(problem: Problem, place: Place, made: list[Inputs]) -> list[str]:
    """A prompt in two chunks that meet on a block border; the second one is also cut inside a block."""
    ((q, k, v),) = made
    size, kv_len, start = problem.config.block_size, k.shape[1], k.shape[1] - q.shape[1]
    prompt_len = kv_len + problem.prompt_extra
    border = (start + kv_len) // 2 // size * size
    cuts = sorted({start, max(border, start), max(kv_len - 1, start), kv_len})
    faults: list[str] = []
    whole = select_blocks(q, k, v, config=problem.config, prompt_len=prompt_len, backend=place.backend)
    for low, high in pairwise(cuts):
        chunk = q[:, low - start : high - start], k[:, :high], v[:, :high]
        faults += _judged(*chunk, problem, place, prompt_len)
        if low % size or (high % size and high != kv_len) or problem.config.magnitude == "zscore":
            continue
        part = select_blocks(*chunk, config=problem.config, prompt_len=prompt_len, backend=place.backend)
        rows = slice(part.first_row - whole.first_row, part.first_row - whole.first_row + part.rows)
        if not torch.equal(part.to_mask(), whole.to_mask()[:, :, rows, : part.key_blocks]):
            faults.append(f"tokens {low} to {high} as a chunk keep other blocks")
    return faults


def _judged(q: Tensor, k: Tensor, v: Tensor, problem: Problem, place: Place, prompt_len: int) -> list[str]:
    config, backend = problem.config, place.backend
    with place.running():
        result = stem_attention(q, k, v, config=config, prompt_len=prompt_len, return_lse=problem.return_lse, backend=backend)
        selection = select_blocks(q, k, v, config=config, prompt_len=prompt_len, backend=backend)
    out, lse = result if isinstance(result, tuple) else (result, None)
    dense = config.dense_below is not None and prompt_len < config.dense_below
    used = keep_everything(q, k, config.block_size) if dense else selection
    return attention_faults(out, lse, q, k, v, used) + selection_faults(selection, q, k, v, config, prompt_len)


def _packed(problem: Problem, place: Place, made: list[Inputs]) -> list[str]:
    """A packed batch, its keys packed too or in pages, against its sequences one by one."""
    q, k, v = (torch.cat([x[0] for x in parts]) for parts in zip(*made, strict=True))
    q_lens, kv_lens = zip(*problem.lengths, strict=True)
    table = None
    if problem.page_size:
        (keys, table), (values, _) = (to_pages(x, kv_lens, problem.page_size) for x in (k, v))
    else:
        keys, values = (surrounded(x) if problem.surrounded else x for x in (k, v))
    prompts = [length + problem.prompt_extra for length in kv_lens]
    with place.running():
        result = stem_attention_varlen(
            q, keys, values, borders(q_lens), borders(kv_lens), max(q_lens), max(kv_lens), page_table=table,
            prompt_lens=prompts, config=problem.config, return_lse=problem.return_lse, backend=place.backend,
        )  # fmt: skip
    out, lse = result if isinstance(result, tuple) else (result, None)
    faults = []
    for i, (low, high) in enumerate(pairwise(borders(q_lens).tolist())):
        if low == high:
            continue
        single = made[i]
        norms = None if lse is None else lse[None, :, low:high]
        config = problem.config
        dense = config.dense_below is not None and prompts[i] < config.dense_below
        selection = (
            keep_everything(single[0], single[1], config.block_size)
            if dense
            else select_blocks(*single, config=config, prompt_len=prompts[i], backend=place.backend)
        )
        faults += [f"sequence {i}: {fault}" for fault in attention_faults(out[None, low:high], norms, *single, selection)]
    return faults
