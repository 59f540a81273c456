"""Every kernel variant once, on tiny shapes, for compute-sanitizer on a GPU. Run it plainly first: that fills Triton's cache.

    python benchmarks/sanitize.py [--only PART OF A NAME]
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 python benchmarks/sanitize.py

The other tools are initcheck, racecheck and synccheck. Without torch's cache every tensor is an allocation of its own, so that
memcheck sees one element too far. racecheck has hundreds of known reports in Hopper's kernel (docs/reliability.md), and shows
as many as --print-limit allows. Run it in parts, side by side: triton, hopper-d64, hopper-d128, hopper-d192, hopper-d256,
select, mass-.

    compute-sanitizer --tool racecheck --racecheck-report analysis --print-limit 1000 python benchmarks/sanitize.py --only PART
"""

import argparse
import itertools
import time

import torch

from stem_attention import Mass, Stem, block_sparse_attention, explain, select_blocks, stem_attention, stem_attention_varlen
from stem_attention.testing import make_qkv, pack, random_selection

LENGTHS = [(130, 130), (1, 300), (0, 70), (200, 333)]
SINKS = (0.5, -1.0, 4.0, 40.0)


def variants():
    for backend, dim, block in itertools.product(("triton", "hopper"), (64, 128, 192, 256), (64, 128)):
        request = {"device": "cuda", "dtype": torch.bfloat16, "head_dim": dim, "value_dim": value_dim(dim)}
        if explain(**request, backend=backend).chosen is None:
            continue
        name = f"{backend}-d{dim}-b{block}"
        for lse in (False, True):
            yield f"{name}-lists{'-lse' * lse}", lambda a=(backend, dim, block, lse): lists(*a)
        yield f"{name}-form", lambda a=(backend, dim, block): lists(*a, True, sinks=SINKS, softcap=5.0)
        yield f"{name}-window", lambda a=(backend, dim, block): lists(*a, True, window=100)
        yield f"{name}-gradient", lambda a=(backend, dim, block): gradient(*a)
        yield f"{name}-whole", lambda a=(backend, dim, block): whole(*a)
        if block == 64:
            yield f"{name}-mass", lambda a=(backend, dim): packed(*a, 64, 64, Mass())
        for page in (0, 16, 64, 128):
            yield f"{name}-packed-page{page}", lambda a=(backend, dim, block, page): packed(*a)
    yield "triton-d80-fp16-pointers", lambda: lists("triton", 80, 128, True, torch.float16, odd=True)
    for policy in (Stem.angelslim(), Stem.paper(forced="extra"), Stem(magnitude="none", stride=8)):
        yield f"select-{policy.magnitude}-{policy.forced}", lambda p=policy: select_blocks(*qkv(64, 700, 900), policy=p)
    pools = {}, {"spread": 0.0}, {"key_pool": 16}, {"query_pool": 64, "key_pool": 8}, {"query_pool": 4, "key_pool": 64}
    for backend, dim, fields in itertools.product(("triton", "hopper"), (64, 128, 256), pools):
        if explain(device="cuda", dtype=torch.bfloat16, head_dim=dim, backend=backend).chosen:
            yield f"mass-{backend}-d{dim}-{fields}", lambda a=(dim, fields, backend): by_mass(*a)
    yield "corrupted", corrupted


def value_dim(dim):
    return 128 if dim == 192 else dim


def qkv(dim, q_len, kv_len, dtype=torch.bfloat16, batch=2, heads=(4, 2)):
    return make_qkv(batch, q_len, kv_len, *heads, dim, dtype, "cuda", value_dim=value_dim(dim))


def lists(backend, dim, block, lse, dtype=torch.bfloat16, odd=False, sinks=None, **form):
    q, k, v = qkv(dim, 200, 333, dtype)
    if odd:
        k, v = (torch.nn.functional.pad(x, (1, 4))[..., 1 : dim + 1] for x in (k, v))
    selection = random_selection(2, 4, 200, 333, block, device="cuda")
    sinks = None if sinks is None else torch.tensor(sinks, device="cuda")
    block_sparse_attention(q, k, v, selection, return_lse=lse, backend=backend, sinks=sinks, **form)


def gradient(backend, dim, block):
    """Of q, k, v and sinks; blocks that no row keeps among them."""
    inputs = [x.requires_grad_() for x in qkv(dim, 200, 333)]
    sinks = torch.tensor(SINKS, device="cuda", requires_grad=True)
    selection = random_selection(2, 4, 200, 333, block, density=0.2, device="cuda")
    results = block_sparse_attention(*inputs, selection, sinks=sinks, return_lse=True, backend=backend)
    torch.autograd.grad(sum(x.float().sum() for x in results), [*inputs, sinks])


def by_mass(dim, fields, backend):
    select_blocks(*qkv(dim, 700, 900), policy=Mass(**fields), backend=backend)


def whole(backend, dim, block):
    policy = Stem(block_size=block, min_blocks=3)
    stem_attention(*qkv(dim, 333, 460), policy=policy, dense_below=0, prompt_len=700, backend=backend)


def packed(backend, dim, block, page, policy=None):
    shape = 4, 2, dim, torch.bfloat16, "cuda"
    parts = [make_qkv(1, a, b, *shape, i, value_dim=value_dim(dim)) for i, (a, b) in enumerate(LENGTHS)]
    policy = policy or Stem(block_size=block, min_blocks=3)
    stem_attention_varlen(**pack(parts, page), policy=policy, dense_below=0, return_lse=True, backend=backend)


def corrupted():
    """No address outside a tensor, whatever a list holds: the tensors are exactly as large as they must be."""
    q, k, v = qkv(128, 300, 300)
    good = random_selection(2, 4, 300, 300, 128, device="cuda")
    for backend, wild in itertools.product(("triton", "hopper"), (1 << 20, -(1 << 20), (1 << 31) - 1, -(1 << 31))):
        if explain(device="cuda", dtype=torch.bfloat16, backend=backend).chosen:
            for indices, counts in (
                (torch.full_like(good.indices, wild), good.counts), (good.indices, torch.full_like(good.counts, wild)),
            ):  # fmt: skip
                bad = type(good)(indices, counts, 128, 300, 300)
                block_sparse_attention(q, k, v, bad, backend=backend)


def main():
    """Run the variants asked for, and say how long each took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="run the variants whose name holds this")
    only = parser.parse_args().only
    for name, run in variants():
        if only in name:
            begun = time.monotonic()
            run()
            torch.cuda.synchronize()
            print(f"{name}: {time.monotonic() - begun:.1f} s", flush=True)


if __name__ == "__main__":
    main()
