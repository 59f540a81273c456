"""What a benchmark says: one JSON object, or a table with its notes."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from stem_attention import __version__, explain
from stem_attention.api import dense_limit
from stem_attention.cli.system import cpu_model, version
from stem_attention.config import StemConfig
from stem_attention.evaluation.bench_shapes import Shape
from stem_attention.evaluation.bench_suites import EAGER, Result

_MEASURES: dict[str, Callable[[float], str]] = {
    "ratio": "{:.2f}x".format,
    "default ratio": "{:.2f}x".format,
    "dense ratio": "{:.2f}x".format,
    "selection share": "{:.1%}".format,
    "differing blocks": "{:.1e}".format,
}
_EXPLAINED = {
    "attention": "ratio: the fastest dense time over that of the whole call, sparse at every length; default is the call as "
    "dense_below has it; selection and attention are the whole's halves called apart.",
    "kernel": "ratio: FlexAttention's time on the same lists over Stem's; dense ratio: the fastest dense time over Stem's. "
    "Rates count kept blocks, the diagonal one half.",
    "selection": f"ratio: the time of the policy in eager torch ({EAGER}) over that of select_blocks, which on a CPU runs the "
    "same code; differing blocks: share of the kept ones that eager torch does not keep.",
}
_DRIVER = Path("/proc/driver/nvidia/version")


def report(suite: str, results: list[Result], config: StemConfig) -> dict[str, Any]:
    """Everything measured and what it ran on, as plain JSON types. Times are in seconds."""
    return {"suite": suite, **facts(results[0].shape, config), "results": [_to_json(result) for result in results]}


def facts(shape: Shape, config: StemConfig) -> dict[str, Any]:
    """What a benchmark ran on and with, as plain JSON types."""
    on_cpu = shape.device.type == "cpu"
    explanation = explain(device=shape.device, dtype=shape.dtype, head_dim=shape.head_dim, config=config)
    return {
        "stem_attention": __version__,
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "driver": None if on_cpu else _driver(),
        "device": str(shape.device),
        "device_name": cpu_model() if on_cpu else torch.get_device_module(shape.device).get_device_name(shape.device),
        "threads": torch.get_num_threads(),
        "backend": explanation.chosen,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "config": config.to_dict(),
    }


def _driver() -> str | None:
    """The NVIDIA driver's version, where the kernel gives it."""
    found = re.search(r"\d+\.\d+(\.\d+)?", _DRIVER.read_text()) if _DRIVER.is_file() else None
    return found.group() if found else None


def _to_json(result: Result) -> dict[str, Any]:
    return {
        "length": result.shape.length,
        "check": asdict(result.check),
        "density": result.density,
        "seconds": {name: times.work for name, times in result.times.items()},
        "medians": result.medians,
        "launch_medians": result.launches,
        "measures": result.measures,
        "tflops": {name: rate / 1e12 for name, rate in result.rates.items()},
        "left_out": result.left_out,
    }


def print_report(suite: str, results: list[Result], config: StemConfig, console: Console) -> None:
    """Print the table and what belongs to it."""
    known = facts(results[0].shape, config)
    versions = {name: known[name] for name in ("torch", "triton", "python", "driver") if known[name]}
    if known["backend"] != "triton":
        versions.pop("triton", None)
    threads = f", {known['threads']} threads" if known["device"] == "cpu" else ""
    console.print(
        f"stem-attention {known['stem_attention']}, {', '.join(f'{name} {value}' for name, value in versions.items())}\n"
        f"{known['device']}: {known['device_name']}{threads}\n"
        f"{known['dtype']}, {known['heads']} query heads, {known['kv_heads']} kv heads, head_dim {known['head_dim']}\n"
        f"suite {suite}, backend {known['backend']}"
    )
    console.print(_table(results))
    rounds = len(next(iter(results[0].times.values())).work)
    console.print(f"Medians of {rounds} rounds, everyone in turn on the same inputs.")
    for line in _launches(results):
        console.print(line, soft_wrap=True)
    console.print(_EXPLAINED[suite], soft_wrap=True)
    for line in _left_out(results):
        console.print(line, soft_wrap=True, markup=False)
    for result in results:
        checked = result.check
        console.print(
            f"Checked at {result.shape.length} tokens: {checked.rows} query blocks against fp64, worst relative error of a row "
            f"{checked.error:.1e} (SDPA {checked.dense_error:.1e}).",
            soft_wrap=True,
        )
    shape = results[0].shape
    limit = dense_limit(device=shape.device, dtype=shape.dtype, head_dim=shape.head_dim, config=config)
    if any(result.shape.length < limit for result in results):
        console.print(f"By default stem_attention runs prompts under {limit} tokens dense.")


def _table(results: list[Result]) -> Table:
    contestants = list(dict.fromkeys(name for result in results for name in result.times))
    measures = list(dict.fromkeys(name for result in results for name in result.measures))
    table = Table("tokens", "density", *contestants, *measures, box=SIMPLE)
    for result in results:
        table.add_row(
            str(result.shape.length),
            f"{result.density:.3f}",
            *(_time(result, name) for name in contestants),
            *(_MEASURES[name](result.measures[name]) if name in result.measures else "-" for name in measures),
        )
    return table


def _time(result: Result, name: str) -> str:
    if name not in result.times:
        return "-"
    seconds = result.medians[name]
    text = duration(seconds)
    return f"{text}, {result.rates[name] / 1e12:.3g} TFLOP/s" if name in result.rates else text


def duration(seconds: float) -> str:
    """Seconds to read."""
    if seconds >= 10:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.3f} ms"


def _launches(results: list[Result]) -> list[str]:
    """On a GPU: what the table's times leave out."""
    lines = [
        f"  {result.shape.length} tokens: " + ", ".join(f"{name} {seconds * 1e3:.3f} ms" for name, seconds in launches.items())
        for result in results
        if (launches := result.launches)
    ]
    return ["Times are the GPU's own, its queue kept busy. A call keeps the host this long:", *lines] if lines else []


def _left_out(results: list[Result]) -> list[str]:
    """One line per peer and reason."""
    lengths: dict[tuple[str, str], list[int]] = {}
    for result in results:
        for name, reason in result.left_out.items():
            lengths.setdefault((name, reason), []).append(result.shape.length)
    return [
        f"{name}: {reason}" + ("" if len(where) == len(results) else f" (at {', '.join(map(str, where))} tokens)")
        for (name, reason), where in lengths.items()
    ]
