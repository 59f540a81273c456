"""Time the host takes for one more layer of a server's step, as vLLM calls it, beside one elementwise kernel of torch.

    python benchmarks/host_time.py

32 layers with caches of their own share a step of 1024 tokens, which the GPU is through with sooner than the host.
"""

from __future__ import annotations

import json
import statistics
import time

import torch

from stem_attention import Mass, Stem
from stem_attention.backends import run
from stem_attention.call import Call, PackedBatch

TOKENS, LAYERS, DIM = 1024, 32, 128


def main() -> None:
    """Print a line for each policy: medians in microseconds."""
    gpu = torch.device("cuda")
    q = torch.randn(TOKENS, 32, DIM, device=gpu, dtype=torch.bfloat16)
    out, kept = torch.empty_like(q), torch.zeros(1, dtype=torch.int64, device=gpu)
    caches = [torch.randn(TOKENS // 64, 8, 64, 2 * DIM, device=gpu, dtype=torch.bfloat16) for _ in range(LAYERS)]
    table = torch.arange(TOKENS // 64, device=gpu, dtype=torch.int32)[None]
    for policy in (Mass(), Stem()):
        batch, taken, elementwise = PackedBatch.plan([TOKENS], [TOKENS], page_table=table, device=gpu), [], []
        for step in range(45):
            for cache in caches:
                k, v = cache.transpose(1, 2).split(DIM, -1)
                begin = time.perf_counter()
                run(Call(q, k, v, policy, DIM**-0.5, 0, batch, 0, out=out, kept=kept))
                taken.append(time.perf_counter() - begin)
            torch.cuda.synchronize()
            for _ in range(10):
                begin = time.perf_counter()
                table.add_(0)
                elementwise.append(time.perf_counter() - begin)
            torch.cuda.synchronize()
            if step < 5:
                taken.clear()
        layer, one = (statistics.median(times) * 1e6 for times in (taken, elementwise))
        row = {"policy": policy.name, "layer_us": round(layer, 1), "elementwise_us": round(one, 1)}
        print(json.dumps({"device": torch.cuda.get_device_name(), **row}), flush=True)


if __name__ == "__main__":
    main()
