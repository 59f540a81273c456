"""``stem-attention run``: one prompt, read dense and sparse."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stem_attention.cli.job import Job, JobOptions, prepare, read_with_progress
from stem_attention.cli.options import check_counts
from stem_attention.cli.pictures import save_picture
from stem_attention.cli.system import output, progress_console
from stem_attention.evaluation.prefill import Agreement, Reading, agreement, read
from stem_attention.evaluation.views import HeadRecorder

MISSED = 3
"""Exit code when the sparse answer lacks the planted fact."""

_WARM_UP_TOKENS = 256


@dataclass(frozen=True)
class Outcome:
    """What the two readings gave."""

    job: Job
    dense: Reading
    sparse: Reading

    @property
    def agreement(self) -> Agreement:
        """How near the two are."""
        return agreement(self.dense, self.sparse)

    def answer(self, reading: Reading) -> str:
        """The text of an answer."""
        return str(self.job.tokenizer.decode(reading.tokens, skip_special_tokens=True)).strip()

    def found(self, reading: Reading) -> bool | None:
        """Whether the answer holds the planted fact; None without one."""
        planted = self.job.prompt.answer
        return None if planted is None else planted in self.answer(reading)

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain types."""
        layers = [
            {"layer": call.layer, "density": call.density, "sparse": call.sparse, "reason": call.reason,
             "dense_seconds": dense, "seconds": seconds}
            for call, dense, seconds in zip(
                self.sparse.calls, self.dense.attention_seconds, self.sparse.attention_seconds, strict=True
            )
        ]  # fmt: skip
        return {
            **self.job.describe(),
            "planted": self.job.prompt.answer,
            "dense": self._reading_json(self.dense),
            "sparse": {**self._reading_json(self.sparse), "density": self.sparse.density, "layers": layers},
            "ratio": {
                "time_to_first_token": self.dense.seconds / self.sparse.seconds,
                "attention": sum(self.dense.attention_seconds) / sum(self.sparse.attention_seconds),
            },
            "agreement": asdict(self.agreement),
        }

    def _reading_json(self, reading: Reading) -> dict[str, Any]:
        return {
            "time_to_first_token_seconds": reading.seconds,
            "attention_seconds": sum(reading.attention_seconds),
            "answer": self.answer(reading),
            "found": self.found(reading),
        }


def run_command(options: JobOptions, *, verbose: bool, as_json: bool) -> int:
    """Run the main job and report; returns the exit code.

    Raises:
        UserError: Some option is wrong; the message names it.
        UnsupportedError: The model's class cannot take Stem's attention function.
    """
    check_counts(max_new_tokens=options.max_new_tokens)
    progress = progress_console()
    job = prepare(options, progress)
    recorder = HeadRecorder(job.layers or [job.layer_count // 2], job.heads, job.choice.config)
    with progress.status("warming up"):
        _warm_up(job)
    dense = read_with_progress(job, progress, dense=True, max_new_tokens=options.max_new_tokens)
    sparse = read_with_progress(
        job, progress, dense=False, max_new_tokens=options.max_new_tokens, recorder=recorder if options.plot else None
    )
    outcome = Outcome(job, dense, sparse)
    if as_json:
        print(json.dumps(outcome.to_json()))
    else:
        _print(outcome, output(), verbose)
    if options.plot is not None:
        with progress.status("drawing"):
            save_picture(job, sparse, recorder, file=options.plot)
        progress.print(f"wrote {options.plot}", markup=False)
    return MISSED if outcome.found(sparse) is False else 0


def _warm_up(job: Job) -> None:
    """Let first calls pay for what is paid once: thread pools on the CPU, compiled kernels elsewhere."""
    ids = job.prompt.ids
    if job.model.device.type == "cpu":
        ids = ids[:_WARM_UP_TOKENS]
    read(job.model, ids, None)
    read(job.model, ids, job.choice.to_run)


def _print(outcome: Outcome, console: Console, verbose: bool) -> None:
    job, facts = outcome.job, outcome.job.describe()
    console.print(
        f"{facts['model']}\n{facts['prompt_tokens']} prompt tokens, {facts['device']}, {facts['dtype']}, "
        f"{facts['threads']} threads, torch {facts['torch']}",
        markup=False,
    )  # fmt: skip
    if verbose:
        console.print(_layer_table(outcome))
    console.print(_summary_table(outcome))
    if not any(call.sparse for call in outcome.sparse.calls):
        reasons = ", ".join(sorted({call.reason for call in outcome.sparse.calls}))
        console.print(f"No layer ran sparse ({reasons}).")
    near = outcome.agreement
    console.print(
        f"Agreement over the last {near.positions} positions: likeliest token the same in {near.top1:.1%}, "
        f"KL(dense, {job.choice.name}) {near.kl:.4f} nats",
    )


def _summary_table(outcome: Outcome) -> Table:
    dense, sparse = outcome.dense, outcome.sparse
    table = Table("", "dense", outcome.job.choice.name, "ratio")
    table.add_row(*_times("time to first token", dense.seconds, sparse.seconds))
    table.add_row(*_times("of it attention", sum(dense.attention_seconds), sum(sparse.attention_seconds)))
    table.add_row("kept density", "1.000", f"{sparse.density:.3f}", "")
    table.add_row("answer", Text(outcome.answer(dense)), Text(outcome.answer(sparse)), "")
    if outcome.job.prompt.answer is not None:
        found = ("yes" if outcome.found(reading) else "no" for reading in (dense, sparse))
        table.add_row(f"planted {outcome.job.prompt.answer} found", *found, "")
    return table


def _layer_table(outcome: Outcome) -> Table:
    table = Table("layer", "density", "dense", outcome.job.choice.name, "ratio", "how")
    dense, sparse = outcome.dense.attention_seconds, outcome.sparse.attention_seconds
    for call, before, after in zip(outcome.sparse.calls, dense, sparse, strict=True):
        _, *times = _times("", before, after)
        table.add_row(str(call.layer), f"{call.density:.3f}", *times, "sparse" if call.sparse else f"dense: {call.reason}")
    return table


def _times(name: str, dense: float, sparse: float) -> tuple[str, str, str, str]:
    return name, f"{dense:.3f} s", f"{sparse:.3f} s", f"{dense / sparse:.2f}x"
