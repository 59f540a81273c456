"""``stem-attention bench --suite serving``: chunks of many prompts from a paged cache."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from stem_attention.cli.bench_report import duration, facts
from stem_attention.cli.errors import UserError
from stem_attention.cli.system import output, progress_console
from stem_attention.evaluation.bench_serving import ServingResult, run_serving
from stem_attention.evaluation.bench_serving_batches import PAGE_SIZE, Scenario, chunked_prefill, mixed_step
from stem_attention.evaluation.bench_suites import WrongResultError
from stem_attention.evaluation.bench_timing import round_count

if TYPE_CHECKING:
    from stem_attention.config import StemConfig
    from stem_attention.evaluation.bench_shapes import Shape

SUITE = "serving"
_NOTES = (
    f"Attention alone, all steps of a scenario: Stem from scrambled pages of {PAGE_SIZE} tokens, dense attention from "
    "contiguous keys. ratio: the fastest dense time over the same chunks, over Stem's; to one piece: cuDNN over whole prompts."
)


def serving_command(
    shapes: list[Shape], config: StemConfig, *, repeats: int, seed: int, dense: bool, plot: bool, as_json: bool
) -> int:
    """Check, time and report; returns the exit code. Every length makes two scenarios, see :func:`scenarios`.

    Raises:
        UserError: A plot is asked for, or a result failed its check: then no time is printed.
    """
    if plot:
        raise UserError(f"--plot: suite {SUITE} draws none; leave it out")
    results: list[ServingResult] = []
    with Progress(console=progress_console()) as progress:
        for shape in shapes:
            for scenario in scenarios(shape.length, seed):
                task = progress.add_task(scenario.name, total=1 + round_count(shape.device, repeats))
                on_step = partial(progress.advance, task)
                try:
                    results.append(
                        run_serving(scenario, shape, config, repeats=repeats, seed=seed, dense=dense, on_step=on_step)
                    )
                except WrongResultError as error:
                    raise UserError(f"bench: {error}; no time is worth printing") from error
    known = facts(shapes[0], config)
    if as_json:
        report = {"suite": SUITE, "page_size": PAGE_SIZE, **known, "results": [_to_json(result) for result in results]}
        print(json.dumps(report))
    else:
        _print(known, results, output())
    return 0


def scenarios(length: int, seed: int) -> list[Scenario]:
    """Eight prompts of ``length`` tokens in four chunks each, and a step of 64 prompts of up to four times as many."""
    return [chunked_prefill(length), mixed_step(4 * length, seed=seed)]


def _to_json(result: ServingResult) -> dict[str, Any]:
    return {
        "scenario": result.scenario.name,
        "prompts": list(result.scenario.prompts),
        "tokens": result.scenario.tokens,
        "steps": len(result.scenario.steps),
        "check": asdict(result.check),
        "density": result.density,
        "seconds": {name: times.work for name, times in result.times.items()},
        "medians": result.medians,
        "ratios": result.ratios,
        "left_out": result.left_out,
    }


def _print(known: dict[str, Any], results: list[ServingResult], console: Console) -> None:
    console.print(
        f"stem-attention {known['stem_attention']}, torch {known['torch']}, {known['device']}: {known['device_name']}\n"
        f"{known['dtype']}, {known['heads']} query heads, {known['kv_heads']} kv heads, head_dim {known['head_dim']}\n"
        f"suite {SUITE}, backend {known['backend']}"
    )
    names = list(dict.fromkeys(name for result in results for name in result.times))
    ratios = list(dict.fromkeys(name for result in results for name in result.ratios))
    table = Table("scenario", "tokens", "density", *names, *ratios, box=SIMPLE)
    for result in results:
        medians, found = result.medians, result.ratios
        table.add_row(
            result.scenario.name,
            str(result.scenario.tokens),
            f"{result.density:.3f}",
            *(duration(medians[name]) if name in medians else "-" for name in names),
            *(f"{found[name]:.2f}x" if name in found else "-" for name in ratios),
        )
    console.print(table)
    console.print(_NOTES, soft_wrap=True)
    for result in results:
        for name, reason in result.left_out.items():
            console.print(f"{result.scenario.name}: {name}: {reason}", soft_wrap=True, markup=False)
        console.print(
            f"Checked {result.scenario.name}: {result.check.rows} query blocks against fp64, worst relative error of a row "
            f"{result.check.error:.1e} (SDPA {result.check.dense_error:.1e}).",
            soft_wrap=True,
        )
