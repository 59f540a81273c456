"""Run by test_tensor_parallel.py on every rank: sparse training on half of a batch each, by DDP and by FSDP.

Compares the gradients with those of one process that has the whole batch. Exits with 1 where they differ by more than rounding.
On a CPU that is rounding of fp32; on GPUs the kernels run under bf16 autocast, and half a batch is rounded otherwise.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from tests.integrations.tiny import hosts, small_llama, tokens
from tests.parallel_heads import ON_GPU, join
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from stem_attention import Stem
from stem_attention.testing import relative_error

SIZE = 64 if ON_GPU else 16
POLICY = Stem(block_size=SIZE, stride=4, sink_blocks=1, local_blocks=1, tail_blocks=1, min_blocks=2)
LENGTH, BOUND = 20 * SIZE, 2e-2 if ON_GPU else 1e-5


def model_on(device: torch.device) -> nn.Module:
    """A model in training whose layers are sparse."""
    model: nn.Module = small_llama("stem", head_dim=SIZE).train().to(device)
    hosts.set_policy(model, POLICY, dense_below=0)
    return model


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Gradients of every weight after one backward pass, whole on every rank."""
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=ON_GPU):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    found = {}
    for name, weight in model.named_parameters():
        grad = weight.grad
        assert grad is not None
        found[name.removeprefix("module.")] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def main() -> None:
    rank, device = join()
    ids = tokens(2 * dist.get_world_size(), LENGTH).to(device)
    mine = ids.chunk(dist.get_world_size())[rank]
    expected = gradients(model_on(device), ids)
    sharded = model_on(device)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    ways = {"DDP": DistributedDataParallel(model_on(device)), "FSDP": sharded}
    errors = {
        f"{way} {name}": relative_error(grad, expected[name])
        for way, model in ways.items()
        for name, grad in gradients(model, mine).items()
    }
    off = {name: error for name, error in errors.items() if not error < BOUND}
    dist.destroy_process_group()
    print(f"rank {rank} of 2 on {device}: {off or 'gradients of one process'}; {max(errors.values()):.1e}", flush=True)
    raise SystemExit(bool(off))


if __name__ == "__main__":
    main()
