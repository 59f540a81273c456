"""``stem-attention bench``: dense against sparse attention on random inputs."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from stem_attention.api import dense_limit
from stem_attention.cli.errors import UserError
from stem_attention.cli.options import check_counts, read_choice, read_device, read_dtype
from stem_attention.cli.system import cpu_model, output, progress_console, version
from stem_attention.config import StemConfig
from stem_attention.evaluation.speed import Check, Shape, Timing, check, random_inputs, time_attention
from stem_attention.policies import Stem


@dataclass(frozen=True)
class BenchOptions:
    """Option values as they came."""

    lengths: str
    heads: int
    kv_heads: int
    head_dim: int
    device: str
    dtype: str
    repeats: int
    threads: int | None
    seed: int
    preset: str
    config: Path | None
    settings: list[str]


def bench_command(options: BenchOptions, *, as_json: bool) -> int:
    """Check and time every shape, report; returns the exit code.

    Raises:
        UserError: Some option is wrong, or a result failed its check: then no time is printed.
    """
    config = read_choice(Stem.name, options.preset, options.config, options.settings).config
    shapes = read_shapes(options)
    if options.threads is not None:
        check_counts(threads=options.threads)
        torch.set_num_threads(options.threads)
    results = []
    with Progress(console=progress_console()) as progress:
        for shape in shapes:
            task = progress.add_task(f"{shape.length} tokens", total=options.repeats + 2)
            q, k, v = random_inputs(shape, options.seed)
            checked = check(q, k, v, config, options.seed)
            problem = checked.problem(shape.dtype)
            if problem is not None:
                raise UserError(f"bench: wrong result at {shape.length} tokens ({problem}); no time is worth printing")
            progress.advance(task)
            timing = time_attention(q, k, v, config, options.repeats, partial(progress.advance, task))
            results.append((shape, checked, timing))
    if as_json:
        print(json.dumps({**_facts(shapes[0], config), "results": [_to_json(*result) for result in results]}))
    else:
        _print(results, config, output())
    return 0


def read_shapes(options: BenchOptions) -> list[Shape]:
    """The shapes to time.

    Raises:
        UserError: An option is wrong; the message names it.
    """
    check_counts(heads=options.heads, kv_heads=options.kv_heads, head_dim=options.head_dim, repeats=options.repeats)
    if options.heads % options.kv_heads:
        raise UserError(
            f"--kv-heads: expected a divisor of --heads {options.heads}, got {options.kv_heads}; change one of them"
        )
    device = read_device(options.device)
    dtype = read_dtype(options.dtype, device)
    lengths = []
    for text in options.lengths.split(","):
        if not text.strip().isdecimal() or int(text) < 1:
            raise UserError(f"--lengths: expected numbers of tokens such as 8192,32768, got {text.strip()!r}; correct it")
        lengths.append(int(text))
    return [Shape(length, options.heads, options.kv_heads, options.head_dim, dtype, device) for length in lengths]


def _facts(shape: Shape, config: StemConfig) -> dict[str, Any]:
    on_cpu = shape.device.type == "cpu"
    return {
        "stem_attention": version("stem-attention"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(shape.device),
        "device_name": cpu_model() if on_cpu else torch.get_device_module(shape.device).get_device_name(shape.device),
        "threads": torch.get_num_threads(),
        "dtype": str(shape.dtype).removeprefix("torch."),
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "config": config.to_dict(),
    }


def _to_json(shape: Shape, checked: Check, timing: Timing) -> dict[str, Any]:
    return {
        "length": shape.length,
        "check": asdict(checked),
        "density": timing.density,
        "dense_seconds": timing.dense,
        "selection_seconds": timing.selection,
        "attention_seconds": timing.attention,
        "dense_median": timing.dense_median,
        "sparse_median": timing.sparse_median,
        "ratio": timing.ratio,
        "selection_share": timing.selection_share,
    }


def _print(results: list[tuple[Shape, Check, Timing]], config: StemConfig, console: Console) -> None:
    facts = _facts(results[0][0], config)
    console.print(
        f"stem-attention {facts['stem_attention']}, torch {facts['torch']}, python {facts['python']}\n"
        f"{facts['device']}: {facts['device_name']}, {facts['threads']} threads\n"
        f"{facts['dtype']}, {facts['heads']} query heads, {facts['kv_heads']} kv heads, head_dim {facts['head_dim']}",
    )
    table = Table("tokens", "density", "dense SDPA", "selection", "attention", "both", "ratio", "selection share", box=SIMPLE)
    for shape, _, timing in results:
        times = (timing.dense_median, timing.selection_median, timing.attention_median, timing.sparse_median)
        table.add_row(
            str(shape.length), f"{timing.density:.3f}", *map(_milliseconds, times), f"{timing.ratio:.2f}x",
            f"{timing.selection_share:.1%}",
        )  # fmt: skip
    console.print(table)
    console.print(f"Medians of {len(results[0][2].dense)} rounds, dense and sparse in turn on the same inputs.")
    for shape, checked, _ in results:
        console.print(
            f"Checked at {shape.length} tokens: {checked.rows} query blocks against fp64, worst relative error of a row "
            f"{checked.error:.1e} (SDPA {checked.dense_error:.1e})."
        )
    shape = results[0][0]
    limit = dense_limit(device=shape.device, dtype=shape.dtype, head_dim=shape.head_dim, config=config)
    if any(shape.length < limit for shape, _, _ in results):
        console.print(f"Selected at every length here; stem_attention runs prompts under {limit} tokens dense.")


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 10 else f"{seconds:.2f} s"
