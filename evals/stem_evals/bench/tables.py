"""A benchmark to read on a terminal: its JSON object as a table with notes, no wider than the console."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from stem_attention.policies import policy_from_dict
from stem_evals.bench.peers import EAGER, STEM

_NOTES = {
    "attention": "ratio: the fastest dense time over that of the whole call, sparse at every length; default: the call with "
    "its dense_below; selection and attention are the whole's halves called apart.",
    "kernel": "ratio: FlexAttention's time on the same lists over Stem's; dense ratio: the fastest dense time over Stem's. "
    "Rates count kept blocks, the diagonal one half.",
    "selection": f"ratio: the time of the policy in eager torch ({EAGER}) over that of select_blocks; differing blocks: share "
    "of the kept ones that eager torch does not keep.",
    "serving": "Attention alone, all steps of a scenario: Stem from scrambled pages, dense attention from contiguous keys. "
    "ratio: the fastest dense time over Stem's.",
    "ttft": "prefill: from the call to the first token's logits, host included. attention: its share of one more prefill. "
    "first: the process's first at that length. Ratios: the fastest dense prefill's time over Stem's.",
}


def show(report: dict[str, Any], console: Console) -> None:
    """Print what ran, a table, and what belongs to it."""
    results, limit = report["results"], report["dense_below"]
    packages = [name for name in ("torch", "triton", "transformers", "python", "driver") if report.get(name)]
    model = f"{report['model']}, {report['layers']} layers, random weights, " if "model" in report else ""
    heads = f"{report['heads']} query heads, {report['kv_heads']} kv heads, head_dim {report['head_dim']}"
    before = [
        ", ".join(f"{name} {report[name]}" for name in ("stem_attention", *packages)),
        f"{report['device']}: {report['device_name']}, {report['threads']} threads",
        f"{model}{report['dtype']}, {heads}",
        f"suite {report['suite']}, policy {report['spec']}, backend {report['backend']}",
    ]
    lines = [f"Medians of rounds in which everyone ran once, in an order drawn anew. {_NOTES[report['suite']]}"]
    if any(result.get("launch_medians") for result in results):
        lines.append("Times are the GPU's own, with work always waiting for it; host: how long a call keeps the host.")
    if policy_from_dict(report["policy"]).density(1) is None:
        lines.append("Density is that of random inputs; how much of a text this policy keeps is another matter.")
    if limit and any(result.get("length", limit) < limit for result in results):
        lines.append(f"By default prompts under {limit} tokens run dense.")
    for name, call in report.get("first_call", {}).items():
        lines.append(f"First prefill of a new process, {name}: {call['first']:.3g} s, its second {call['second']:.3g} s.")
    for part in (report, *results):
        where = part.get("scenario") or (f"{part['length']} tokens" if "length" in part else f"suite {report['suite']}")
        lines += [f"{where}: {name} left out, {reason}" for name, reason in part.get("left_out", {}).items()]
        lines += [f"{where}: checked {line}" for line in _checks(part.get("check", {}))]
    console.print("\n".join(before), markup=False)
    console.print(_table(pd.DataFrame([row for result in results for row in _rows(result)])))
    console.print("\n".join(lines), markup=False)


def _table(rows: pd.DataFrame) -> Table:
    """Lay rows out as they are; where each is a length with all that was timed there, as a column each, which is narrower."""
    frame = rows if "" in rows else rows.set_index("tokens").T.reset_index(names="tokens")
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for place, heading in enumerate(frame.columns):
        table.add_column(str(heading), justify="right" if place or (heading == "tokens" and frame is rows) else "left")
    for row in frame.itertuples(index=False):
        table.add_row(*(_cell(value) for value in row))
    return table


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "-" if pd.isna(value) else f"{value:.4g}"
    return str(value)


def _rows(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of the table: one of a length or scenario, for whole models one of a contestant."""
    if "timings" not in result:
        yield {
            **{name: result[key] for name, key in (("", "scenario"), ("tokens", "length")) if key in result},
            "density": result["density"],
            **{f"{name}, ms": 1e3 * seconds for name, seconds in result["medians"].items()},
            **{f"{name}, host ms": 1e3 * seconds for name, seconds in result.get("launch_medians", {}).items()},
            **{f"{name}, TFLOP/s": rate for name, rate in result.get("tflops", {}).items()},
            **(result.get("measures") or result.get("ratios") or {}),
        }
        return
    for name, timing in result["timings"].items():
        parts, ours = timing["parts"], name == STEM
        yield {
            "tokens": result["length"],
            "": name,
            "density": result["density"] if ours else 1.0,
            "prefill, s": timing["seconds"],
            "ratio": result["ratios"].get("total", math.nan) if ours else math.nan,
            "attention, %": 100 * parts["attention"] / parts["total"],
            "attention ratio": result["ratios"].get("attention", math.nan) if ours else math.nan,
            "first, s": timing["first"],
            **({} if timing["peak"] is None else {"memory, GiB": timing["peak"] / 2**30}),
        }


def _checks(check: dict[str, Any]) -> Iterator[str]:
    if "rows" in check:
        error = f"{check['error']:.1e} (SDPA {check['dense_error']:.1e})"
        yield f"{check['rows']} query blocks against fp64, worst relative error of a row {error}."
        return
    for name, errors in check.items():
        shown = f"{errors['attention']:.1e} in a layer's attention, {errors['logits']:.1e} in the logits"
        kept = ", every block kept" if name == STEM else ""
        yield f"{errors['tokens']} tokens against plain attention: {name}{kept}, relative error {shown}."
