"""Run by test_tensor_parallel.py on every rank: attention over this rank's heads, as tensor parallelism splits them.

Compares with one process that has all heads, bit for bit: the whole call, its log-sum-exp, the selection, and a packed batch
over a paged cache in chunks. Exits with 1 where anything differs.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor

from stem_attention import Mass, select_blocks, stem_attention, stem_attention_varlen
from stem_attention.testing import pack, structured_qkv

ON_GPU = torch.cuda.is_available()
SIZE = 128 if ON_GPU else 16
LENGTH = SIZE * 21 + 5
HEADS = 12
FACTORS = [[(0.5, 2.0, 1.0, 4.0)[head % 4] for head in range(HEADS)]]
MASS = Mass(head_factors=FACTORS, block_size=SIZE, query_pool=4, key_pool=8, tail_blocks=1)


def results(q: Tensor, k: Tensor, v: Tensor, first: int) -> dict[str, Tensor]:
    """Everything that serving calls, each with its heads, the first of which is ``first``, along dimension 0."""
    policy = MASS.for_layer(0, slice(first, first + q.shape[2]))
    out, lse = stem_attention(q, k, v, policy=policy, dense_below=0, return_lse=True)
    selection = select_blocks(q, k, v, policy=policy)
    cut = SIZE * 9 + 3  # two chunks of one prompt as a batch, the second one from inside a block
    batch = pack([(q[:, :cut], k[:, :cut], v[:, :cut]), (q[:, cut:], k, v)], page_size=16)
    served = stem_attention_varlen(**batch, prompt_lens=[LENGTH] * 2, policy=policy, dense_below=0)
    return {
        "out": out[0].transpose(0, 1),
        "lse": lse[0],
        "indices": selection.indices[0],
        "counts": selection.counts[0],
        "served": served.transpose(0, 1),
    }


def join() -> tuple[int, torch.device]:
    """Join the other ranks; returns this one and its device."""
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank) if ON_GPU else torch.device("cpu")
    if ON_GPU:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if ON_GPU else "gloo")
    return rank, device


def main() -> None:
    rank, device = join()
    ranks = dist.get_world_size()
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    whole = structured_qkv(1, LENGTH, LENGTH, HEADS, 4, 64 if ON_GPU else 16, dtype=dtype, device=device)
    mine = results(*(x.chunk(ranks, dim=2)[rank] for x in whole), first=HEADS // ranks * rank)
    everything = results(*whole, first=0)
    different = []
    for name, part in mine.items():
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(ranks)]
        dist.all_gather(parts, part.contiguous())
        if not torch.equal(torch.cat(parts), everything[name]):
            different.append(name)
    dist.destroy_process_group()
    print(f"rank {rank} of {ranks} on {device}: {', '.join(different) or 'nothing'} differs", flush=True)
    if different:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
