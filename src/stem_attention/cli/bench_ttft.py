"""``stem-attention bench --suite ttft``: whole models read whole prompts, dense and with Stem."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from stem_attention.api import dense_limit
from stem_attention.cli.bench_report import duration, facts
from stem_attention.cli.errors import UserError, need
from stem_attention.cli.options import check_counts, check_plot, read_choice, read_device, read_dtype, read_lengths
from stem_attention.cli.system import output, progress_console, version
from stem_attention.config import StemConfig
from stem_attention.evaluation.bench_shapes import Shape
from stem_attention.policies import Stem

if TYPE_CHECKING:
    from stem_attention.cli.bench import BenchOptions
    from stem_attention.evaluation.bench_ttft import PrefillResult
    from stem_attention.evaluation.bench_ttft_first import FirstCall

SUITE = "ttft"
_CHECKED_TOKENS = 1024
_NOTES = (
    "Time from the call to the first token's logits, host included: medians, everyone in turn. Attention and MLP are shares of "
    "one more prefill, timed in parts; first is the process's first call at that length. Ratio: the time of the fastest dense "
    "prefill over Stem's, that of attention alone in brackets; behind Stem's memory its ratio to that prefill's."
)


def ttft_command(options: BenchOptions, *, as_json: bool) -> int:
    """Check, time and report; returns the exit code.

    Raises:
        UserError: Some option is wrong, or a result failed its check: then no time is printed.
    """
    need("transformers", purpose=f"bench --suite {SUITE}")
    from stem_attention.evaluation.bench_ttft_contestants import WrongResultError
    from stem_attention.evaluation.bench_ttft_models import ARCHITECTURES

    if any(value is not None for value in (options.heads, options.kv_heads, options.head_dim)):
        raise UserError(f"--heads, --kv-heads, --head-dim: suite {SUITE} runs whole models; give --model alone")
    name = options.model or "llama-3.2-1b"
    if name not in ARCHITECTURES:
        raise UserError(f"--model: expected one of {', '.join(ARCHITECTURES)}, got {name!r}; pick one of these names")
    config = read_choice(Stem.name, options.preset, options.config, options.settings).config
    device, lengths = read_device(options.device), sorted(set(read_lengths(options.lengths)))
    dtype = read_dtype(options.dtype, device)
    if options.repeats is not None:
        check_counts(repeats=options.repeats)
    check_plot(options.plot)
    if options.threads is not None:
        check_counts(threads=options.threads)
        torch.set_num_threads(options.threads)
    try:
        report = _run(options, name, lengths, dtype, device, config)
    except WrongResultError as error:
        raise UserError(f"bench: {error}; no time is worth printing") from error
    if options.plot is not None:
        from stem_attention.evaluation.bench_ttft_plot import plot_ttft

        plot_ttft(report, options.plot)
    if as_json:
        print(json.dumps(report))
    else:
        _print(report, output())
    return 0


def _run(
    options: BenchOptions, name: str, lengths: list[int], dtype: torch.dtype, device: torch.device, config: StemConfig
) -> dict[str, Any]:
    from stem_attention.evaluation.bench_ttft import time_lengths
    from stem_attention.evaluation.bench_ttft_contestants import check_contestants, contestants
    from stem_attention.evaluation.bench_ttft_models import ARCHITECTURES, build_model, random_tokens

    architecture = ARCHITECTURES[name]
    with Progress(console=progress_console()) as progress:
        task = progress.add_task("first call in a new process", total=1, visible=options.first_call)
        calls = _first_calls(options, name, lengths, dtype, device, config) if options.first_call else {}
        progress.advance(task)
        task = progress.add_task(f"{name}: weights, check", total=1)
        model = build_model(architecture, dtype, device, options.seed)
        tokens = random_tokens(model, min(_CHECKED_TOKENS, lengths[0]), options.seed)
        entrants, checks, left_out = check_contestants(model, contestants(device, options.dense), tokens, config)
        progress.advance(task)

        def start(length: int, passes: int) -> Callable[[], None]:
            return partial(progress.advance, progress.add_task(f"{length} tokens", total=passes))

        results = time_lengths(model, entrants, lengths, config, repeats=options.repeats, seed=options.seed, on_length=start)
    shape = Shape(lengths[0], architecture.heads, architecture.kv_heads, architecture.head_dim, dtype, device)
    return {
        "suite": SUITE,
        "model": name,
        "layers": architecture.layers,
        **facts(shape, config),
        "transformers": version("transformers"),
        "check": {who: asdict(check) for who, check in checks.items()},
        "left_out": left_out,
        "first_call": {who: asdict(call) for who, call in calls.items()},
        "results": [_to_json(result) for result in results],
    }


def _first_calls(
    options: BenchOptions, name: str, lengths: list[int], dtype: torch.dtype, device: torch.device, config: StemConfig
) -> dict[str, FirstCall]:
    from stem_attention.evaluation.bench_ttft_contestants import STEM, contestants
    from stem_attention.evaluation.bench_ttft_first import Job, ProcessError, first_calls
    from stem_attention.evaluation.bench_ttft_models import ARCHITECTURES

    dense = next((entrant.name for entrant in contestants(device, options.dense) if entrant.name != STEM), None)
    kind, head_dim = str(dtype).removeprefix("torch."), ARCHITECTURES[name].head_dim
    limit = dense_limit(device=device, dtype=dtype, head_dim=head_dim, config=config)
    length = next((length for length in lengths if length >= limit), limit)  # a dense call would load no kernel of ours
    try:
        return first_calls(Job(name, length, kind, str(device), STEM, config.to_json(), options.seed), dense)
    except ProcessError as error:
        raise UserError(f"--first-call: a measuring process failed: {error}; try without the option") from error


def _to_json(result: PrefillResult) -> dict[str, Any]:
    return {
        "length": result.length,
        "density": result.density,
        "ratios": result.ratios,
        "timings": {name: {"seconds": timing.seconds, **asdict(timing)} for name, timing in result.timings.items()},
        "left_out": result.left_out,
    }


def _print(report: dict[str, Any], console: Console) -> None:
    versions = ", ".join(f"{name} {report[name]}" for name in ("torch", "triton", "transformers", "driver") if report[name])
    console.print(
        f"stem-attention {report['stem_attention']}, {versions}\n{report['device']}: {report['device_name']}\n"
        f"{report['model']}, {report['layers']} layers, {report['dtype']}, random weights, backend {report['backend']}"
    )
    console.print(_table(report["results"]))
    console.print(_NOTES, soft_wrap=True)
    for name, call in report["first_call"].items():
        console.print(
            f"First prefill of a new process, {name}: {duration(call['first'])}, its second {duration(call['second'])}.",
            soft_wrap=True,
        )
    for name, reason in report["left_out"].items():
        console.print(f"{name}: {reason}", soft_wrap=True, markup=False)
    for result in report["results"]:
        for name, reason in result["left_out"].items():
            console.print(f"{name}: {reason} (at {result['length']} tokens)", soft_wrap=True, markup=False)
    for name, check in report["check"].items():
        console.print(
            f"Checked at {check['tokens']} tokens against plain attention: {name}, relative error {check['attention']:.1e} in "
            f"a layer's attention, {check['logits']:.1e} in the logits" + (", every block kept." if name == "Stem" else "."),
            soft_wrap=True,
        )


def _table(results: list[dict[str, Any]]) -> Table:
    table = Table("tokens", "density", "", "prefill", "attention", "MLP", "first", "memory", "ratio", box=SIMPLE)
    for result in results:
        for name, timing in result["timings"].items():
            is_stem, ratios, parts = name == "Stem", result["ratios"], timing["parts"]
            memory = "-" if timing["peak"] is None else f"{timing['peak'] / 2**30:.1f} GiB"
            memory += f" ({ratios['memory']:.3f})" if is_stem and "memory" in ratios else ""
            table.add_row(
                str(result["length"]),
                f"{result['density']:.3f}" if is_stem else "1",
                name,
                duration(timing["seconds"]),
                f"{parts['attention'] / parts['total']:.1%}",
                f"{parts['mlp'] / parts['total']:.1%}",
                "-" if timing["first"] is None else duration(timing["first"]),
                memory,
                f"{ratios['total']:.2f}x ({ratios['attention']:.2f}x)" if is_stem and ratios else "",
            )
    return table
