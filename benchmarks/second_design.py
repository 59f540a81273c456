"""Compare this tree on a GPU with commit cf0cedb, the last of the first design: blocks, bits, GPU times, host times.

    git archive cf0cedb src | tar x -C OLD
    python benchmarks/second_design.py OLD/src --json FILE

Both trees run in one process, the old one under another name, in an order drawn anew each round, with an emptied cache and a
full queue. 32 query and 8 key/value heads of 128 in bf16, random inputs. Host times are those of short calls, whose kernels
are faster than the host.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from stem_attention import Mass, Policy, Stem, block_sparse_attention, select_blocks, stem_attention
from stem_attention.backends import run
from stem_attention.call import Call, PackedBatch

SCALE = 128**-0.5
GPU = torch.device("cuda")
Runs = dict[str, Callable[[], object]]

# The package where it is named as one, and not the function of that name.
_MODULE = re.compile(r"(?<=from )stem_attention\b|(?<=import )stem_attention\b|\bstem_attention(?=\.\w|::)")


def main() -> None:
    """Print a line for each comparison, and write them all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="the folder src of the old tree")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    old = load(options.old)
    rules = {
        "stem": (old.StemConfig(dense_below=0), Stem()),
        "mass": (old.StemConfig.mass(dense_below=0), Mass()),
    }
    rows = [compare(old, rule, *rules[rule], tokens) for rule in rules for tokens in (8192, 32768, 131072)]
    host = {rule: host_times(old, *rules[rule]) for rule in rules}
    print(json.dumps(host, indent=1))
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "old": "cf0cedb"}
    if options.json:
        options.json.write_text(json.dumps({**facts, "gpu": rows, "host_us": host}, indent=1) + "\n")


def load(source: Path) -> Any:
    """The old package under the name ``stem_attention_old``."""
    target = Path(tempfile.mkdtemp())
    for file in (source / "stem_attention").rglob("*"):
        if file.suffix in (".py", ".json"):
            copy = target / "stem_attention_old" / file.relative_to(source / "stem_attention")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(_MODULE.sub("stem_attention_old", file.read_text()))
    sys.path.insert(0, str(target))
    import stem_attention_old

    return stem_attention_old


def tensors(tokens: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """q, k and v of a prompt."""
    draw = torch.Generator(GPU).manual_seed(seed)
    shapes = ((1, tokens, heads, 128) for heads in (32, 8, 8))
    return tuple(torch.randn(shape, generator=draw, device=GPU, dtype=torch.bfloat16) for shape in shapes)


def paged(tokens: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Keys and values in shuffled pages of 64, and the page table."""
    table = torch.randperm(tokens // 64, device=GPU)
    caches = [torch.empty(tokens // 64, 64, 8, 128, device=GPU, dtype=torch.bfloat16) for _ in range(2)]
    for cache, x in zip(caches, (k, v), strict=True):
        cache[table] = x.view(-1, 64, 8, 128)
    return *caches, table.to(torch.int32)[None]


def compare(old: Any, rule: str, config: Any, policy: Policy, tokens: int) -> dict[str, Any]:
    """Blocks, bits and times of one rule and length."""
    q, k, v = tensors(tokens)
    before, now = old.select_blocks(q, k, v, config=config), select_blocks(q, k, v, policy=policy)
    first = stem_attention(q, k, v, policy=policy, dense_below=0)
    again = stem_attention(q, k, v, policy=policy, dense_below=0)  # what the first call recorded
    expected = old.stem_attention(q, k, v, config=config)
    row: dict[str, Any] = {
        "rule": rule, "tokens": tokens, "density": round(now.density(), 4),
        "same_blocks": torch.equal(before.counts, now.counts) and torch.equal(before.indices, now.indices),
        "same_bits": torch.equal(first, expected) and torch.equal(again, expected),
    }  # fmt: skip
    kc, vc, table = paged(tokens, k, v)
    batch = PackedBatch.plan([tokens], [tokens], page_table=table, device=GPU)
    call, text, whole = Call(q[0], kc, vc, policy, SCALE, batch=batch, dense_below=0), config.to_json(), (0, tokens)
    runs: Runs = {
        "select old": lambda: old.select_blocks(q, k, v, config=config),
        "select new": lambda: select_blocks(q, k, v, policy=policy),
        "kernel old": lambda: old.block_sparse_attention(q, k, v, before),
        "kernel new": lambda: block_sparse_attention(q, k, v, now),
        "whole old": lambda: old.stem_attention(q, k, v, config=config),
        "whole new": lambda: stem_attention(q, k, v, policy=policy, dense_below=0),
        "paged old": lambda: old.ops.forward_varlen(q[0], kc, vc, whole, whole, table, text, SCALE, (tokens,), False, "auto"),
        "paged new": lambda: run(call),
    }
    times = gpu_times(runs, 80 if tokens < 100000 else 40)
    row["ms"] = {name: round(taken, 4) for name, taken in times.items()}
    parts = ("select", "kernel", "whole", "paged")
    row["new_over_old"] = {part: round(times[f"{part} new"] / times[f"{part} old"], 4) for part in parts}
    print(json.dumps(row), flush=True)
    return row


def gpu_times(runs: Runs, rounds: int) -> dict[str, float]:
    """Median milliseconds on the GPU."""
    flush, taken = torch.empty(256 << 20, dtype=torch.int8, device=GPU), {name: list[float]() for name in runs}
    for one in [*runs.values()] * 3:
        one()
    for _ in range(rounds):
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)  # the queue stays full
        events = []
        for name in random.sample(list(runs), len(runs)):
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            runs[name]()
            end.record()
            events.append((name, begin, end))
        torch.cuda.synchronize()
        for name, begin, end in events:
            taken[name].append(begin.elapsed_time(end))
    return {name: statistics.median(x) for name, x in taken.items()}


def host_times(old: Any, config: Any, policy: Policy) -> dict[str, float]:
    """Median microseconds of the host for one call, through each way in; 1024 tokens."""
    import stem_attention_old.integrations.transformers as old_host

    from stem_attention.integrations import transformers as host

    tokens, layer = 1024, torch.nn.Module()
    layer.config, layer.layer_idx, layer.is_causal = type("Config", (), {})(), 3, True
    q, k, v = tensors(tokens)
    given = torch.empty_like(q[0])
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    kc, vc, table = paged(tokens, k, v)
    batch, text, whole = PackedBatch.plan([tokens], [tokens], page_table=table, device=GPU), config.to_json(), (0, tokens)
    runs: Runs = {
        "stem_attention old": lambda: old.stem_attention(q, k, v, config=config),
        "stem_attention new": lambda: stem_attention(q, k, v, policy=policy, dense_below=0),
        "a further layer of a server's step old": lambda: old.ops.forward_varlen(
            q[0], kc, vc, whole, whole, table, text, SCALE, (tokens,), False, "auto"
        ),
        "a further layer of a server's step new": lambda: run(
            Call(q[0], kc, vc, policy, SCALE, batch=batch, dense_below=0, out=given)  # vLLM gives the result's place
        ),
        "through transformers old": lambda: old_host.attention_forward(layer, *heads_first, None, scaling=SCALE),
        "through transformers new": lambda: host.attention_forward(layer, *heads_first, None, scaling=SCALE),
        "an elementwise kernel": lambda: table.add_(0),
    }
    taken = {name: list[float]() for name in runs}
    with old_host.configure(config), host.use_policy(policy, dense_below=0):
        for _ in range(60):
            for name in random.sample(list(runs), len(runs)):
                torch.cuda.synchronize()
                runs[name]()
                for _ in range(10):
                    begin = time.perf_counter()
                    runs[name]()
                    taken[name].append(time.perf_counter() - begin)
    return {name: round(statistics.median(x) * 1e6, 1) for name, x in taken.items()}


if __name__ == "__main__":
    main()
