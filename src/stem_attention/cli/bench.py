"""``stem-attention bench``: Stem against its peers on random inputs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.progress import Progress

from stem_attention.cli.bench_report import print_report, report
from stem_attention.cli.bench_serving import SUITE as SERVING
from stem_attention.cli.bench_serving import serving_command
from stem_attention.cli.bench_ttft import SUITE as TTFT
from stem_attention.cli.bench_ttft import ttft_command
from stem_attention.cli.errors import UserError
from stem_attention.cli.options import check_counts, check_plot, read_choice, read_device, read_dtype, read_heads, read_lengths
from stem_attention.cli.system import output, progress_console
from stem_attention.evaluation.bench_shapes import Heads, Shape
from stem_attention.evaluation.bench_suites import SUITES, Result, WrongResultError, run_suite
from stem_attention.evaluation.bench_timing import round_count
from stem_attention.policies import Stem

_DEFAULT_HEADS = Heads(8, 2, 64)
_CPU_REPEATS = 5
_GPU_REPEATS = 20


@dataclass(frozen=True)
class BenchOptions:
    """Option values as they came."""

    suite: str
    lengths: str
    model: str | None
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    device: str
    dtype: str
    repeats: int | None
    threads: int | None
    seed: int
    dense: bool
    preset: str
    config: Path | None
    settings: list[str]
    plot: Path | None
    first_call: bool


def bench_command(options: BenchOptions, *, as_json: bool) -> int:
    """Check and time every shape, report; returns the exit code.

    Raises:
        UserError: Some option is wrong, or a result failed its check: then no time is printed.
    """
    if options.suite == TTFT:
        return ttft_command(options, as_json=as_json)
    if options.suite not in (*SUITES, SERVING):
        names = ", ".join((*SUITES, SERVING, TTFT))
        raise UserError(f"--suite: expected one of {names}, got {options.suite!r}; pick one of these names")
    config = read_choice(Stem.name, options.preset, options.config, options.settings).config
    if config.head_factors is not None:
        raise UserError("--config: expected no head_factors, got some; made-up inputs are of no model: time it with eval cost")
    shapes = read_shapes(options)
    usual = _CPU_REPEATS if shapes[0].device.type == "cpu" else _GPU_REPEATS
    repeats = usual if options.repeats is None else options.repeats
    check_counts(repeats=repeats)
    check_plot(options.plot)
    if options.threads is not None:
        check_counts(threads=options.threads)
        torch.set_num_threads(options.threads)
    if options.suite == SERVING:
        return serving_command(
            shapes, config, repeats=repeats, seed=options.seed, dense=options.dense, plot=options.plot is not None,
            as_json=as_json,
        )  # fmt: skip
    run = partial(run_suite, options.suite, config=config, repeats=repeats, seed=options.seed, dense=options.dense)
    results: list[Result] = []
    with Progress(console=progress_console()) as progress:
        for shape in shapes:
            task = progress.add_task(f"{shape.length} tokens", total=1 + round_count(shape.device, repeats))
            try:
                results.append(run(shape, on_step=partial(progress.advance, task)))
            except WrongResultError as error:
                raise UserError(f"bench: {error}; no time is worth printing") from error
    if options.plot is not None:
        from stem_attention.evaluation.bench_plot import plot_times

        plot_times(results, f"stem-attention bench --suite {options.suite} on {shapes[0].device}", options.plot)
    if as_json:
        print(json.dumps(report(options.suite, results, config)))
    else:
        print_report(options.suite, results, config, output())
    return 0


def read_shapes(options: BenchOptions) -> list[Shape]:
    """The shapes to time.

    Raises:
        UserError: An option is wrong; the message names it.
    """
    heads = read_heads(_DEFAULT_HEADS, options.model, options.heads, options.kv_heads, options.head_dim)
    device = read_device(options.device)
    dtype = read_dtype(options.dtype, device)
    lengths = read_lengths(options.lengths)
    return [Shape(length, heads.heads, heads.kv_heads, heads.head_dim, dtype, device) for length in lengths]
