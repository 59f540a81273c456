"""Run by test_tensor_parallel.py on every rank: attention over this rank's heads, as tensor parallelism splits them.

Compares with one process that has all heads, bit for bit: the whole call, its log-sum-exp, the selection, and a packed batch
over a paged cache in chunks. Exits with 1 where anything differs.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor

from stem_attention import StemConfig, select_blocks, stem_attention, stem_attention_varlen
from stem_attention.testing import structured_qkv

ON_GPU = torch.cuda.is_available()
SIZE = 128 if ON_GPU else 16
LENGTH = SIZE * 21 + 5
CONFIG = StemConfig(block_size=SIZE, min_blocks=3, sink_blocks=1, local_blocks=1, tail_blocks=1, dense_below=0)


def results(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    """Everything that serving calls, each with its heads along dimension 0."""
    out, lse = stem_attention(q, k, v, config=CONFIG, return_lse=True)
    selection = select_blocks(q, k, v, config=CONFIG)
    cut = SIZE * 9 + 3  # two chunks of one prompt as a batch, the second one from inside a block
    packed = torch.cat([q[0, :cut], q[0, cut:]])
    pages = -(-LENGTH // 16)
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(0))
    caches = []
    for x in (k, v):
        padded = torch.zeros((pages * 16, *x.shape[2:]), dtype=x.dtype, device=x.device)
        padded[:LENGTH] = x[0]
        cache = torch.empty_like(padded).view(pages, 16, *x.shape[2:])
        cache[order.to(x.device)] = padded.view(cache.shape)
        caches.append(cache)
    table = order.to(torch.int32).expand(2, -1).contiguous().to(q.device)
    starts = torch.tensor([0, cut, LENGTH], dtype=torch.int32), torch.tensor([0, cut, cut + LENGTH], dtype=torch.int32)
    served = stem_attention_varlen(
        packed, *caches, *starts, LENGTH - cut, LENGTH, page_table=table, prompt_lens=[LENGTH] * 2, config=CONFIG
    )
    return {
        "out": out[0].transpose(0, 1),
        "lse": lse[0],
        "indices": selection.indices[0],
        "counts": selection.counts[0],
        "served": served.transpose(0, 1),
    }


def main() -> None:
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank) if ON_GPU else torch.device("cpu")
    if ON_GPU:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if ON_GPU else "gloo")
    ranks = dist.get_world_size()
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    whole = structured_qkv(1, LENGTH, LENGTH, 12, 4, 64 if ON_GPU else 16, dtype=dtype, device=device)
    mine = results(*(x.chunk(ranks, dim=2)[rank] for x in whole))
    everything = results(*whole)
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
