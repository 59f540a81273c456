"""One long prompt over several GPUs: every rank holds a part of the sequence, attention runs on whole sequences of some heads.

    torchrun --standalone --nproc-per-node=2 examples/ulysses.py --tokens 131072

Before attention an all-to-all trades sequence parts for heads, after it another trades them back (DeepSpeed-Ulysses, arXiv
2309.14509). Every head chooses its blocks on its own, and the keys it chooses from are all there, so nothing else is needed.
Without GPUs it runs on the CPU, without torchrun as a single rank. Rank 0 compares with one process that has everything.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
import torch.distributed as dist
from torch import Tensor

from stem_attention import Policy, stem_attention


def heads_for_sequence(x: Tensor) -> Tensor:
    """All-to-all: this rank's part of the sequence, all heads -> the whole sequence, this rank's part of the heads.

    Args:
        x: ``(1, tokens / ranks, heads, dim)``; ``heads`` is a multiple of the number of ranks.

    Returns:
        ``(1, tokens, heads / ranks, dim)``.
    """
    ranks = dist.get_world_size()
    sent = torch.stack(x[0].chunk(ranks, dim=1))  # (to rank, tokens here, heads there, dim)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    return received.flatten(0, 1)[None]


def sequence_for_heads(x: Tensor) -> Tensor:
    """The way back: ``(1, tokens, heads / ranks, dim)`` -> ``(1, tokens / ranks, heads, dim)``."""
    ranks = dist.get_world_size()
    sent = torch.stack(x[0].chunk(ranks))  # (to rank, tokens there, heads here, dim)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    return received.transpose(0, 1).flatten(1, 2)[None]


def ulysses_attention(q: Tensor, k: Tensor, v: Tensor, policy: Policy | str | None = None) -> Tensor:
    """Compute sparse attention over a prompt that is spread over ranks, in equal parts and in order.

    Args:
        q: ``(1, tokens / ranks, q_heads, dim)``.
        k: ``(1, tokens / ranks, kv_heads, dim)``; ``kv_heads`` is a multiple of the number of ranks.
        v: The shape of ``k``.
        policy: What to keep; Mass() unless given.

    Returns:
        Like ``q``.
    """
    out = stem_attention(*(heads_for_sequence(x) for x in (q, k, v)), policy=policy, dense_below=0)
    return sequence_for_heads(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Check and time sparse attention on a prompt spread over ranks.")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, nargs=3, default=(8, 2, 64), metavar=("Q", "KV", "DIM"))
    options = parser.parse_args()
    rank, on_gpu = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    backend = "nccl" if on_gpu else "gloo"
    if dist.is_torchelastic_launched():
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    ranks, (q_heads, kv_heads, dim) = dist.get_world_size(), options.heads
    if options.tokens % ranks or kv_heads % ranks:
        raise SystemExit(f"{options.tokens} tokens and {kv_heads} kv heads must be multiples of the {ranks} ranks")

    draw = torch.Generator(device).manual_seed(0)  # the same on every rank, which keeps its part
    dtype = torch.bfloat16 if on_gpu else torch.float32
    whole = [
        torch.randn((1, options.tokens, heads, dim), generator=draw, device=device, dtype=dtype)
        for heads in (q_heads, kv_heads, kv_heads)
    ]
    mine = [x.chunk(ranks, dim=1)[rank] for x in whole]
    for run in ("first", "second"):
        dist.barrier()
        start = time.perf_counter()
        out = ulysses_attention(*mine)
        if on_gpu:
            torch.cuda.synchronize()
        if rank == 0:
            print(
                f"{run} call, {ranks} ranks, {options.tokens} tokens: {(time.perf_counter() - start) * 1e3:.1f} ms", flush=True
            )

    parts = [torch.empty_like(out) for _ in range(ranks)]
    dist.all_gather(parts, out.contiguous())
    same = torch.equal(torch.cat(parts, 1), stem_attention(*whole, dense_below=0))
    if rank == 0:
        print("equal to one process, bit for bit" if same else "differs from one process", flush=True)
    dist.destroy_process_group()
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
