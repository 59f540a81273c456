"""Tasks of lm-eval as a measure: lm-eval makes the prompts, lets the host generate and scores the answers."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stem_attention.errors import bad_argument
from stem_attention.evaluation.intervals import mean_interval
from stem_attention.evaluation.lm_host import PrefillMeter, quiet
from stem_attention.evaluation.measure import Case, Record, Section, Table, What
from stem_attention.evaluation.prefill import Watcher

DENSE = "dense"

Load = Callable[[str, int], Any]
"""Makes lm-eval's Task from its name and a length in tokens; the same arguments always give the same prompts."""


class LmTasks:
    """Tasks of lm-eval at some lengths; see :class:`stem_attention.evaluation.measure.Measure`.

    Args:
        name: The measure's.
        model: Loaded by :func:`stem_attention.evaluation.models.load_model`.
        tokenizer: Its tokenizer.
        tasks: lm-eval's names.
        lengths: Tokens.
        samples: Prompts of each task at each length: the first ones, or all if there are fewer.
        load: Makes a task.
        metric: Which of lm-eval's metrics is the score, for a length.
        cut: Whether a prompt that leaves its answer no room in the length loses its beginning; else it is read whole.
        batch: Prompts read together. Padding is on the left.

    Raises:
        ValueError: There are no tasks or lengths, or ``samples`` or ``batch`` is below 1.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Sequence[str],
        lengths: Sequence[int],
        samples: int,
        load: Load,
        metric: Callable[[int], str],
        *,
        cut: bool,
        batch: int = 1,
    ) -> None:
        for argument, values in (("tasks", tasks), ("lengths", lengths)):
            if not values:
                raise bad_argument(argument, "at least one", "none", f"name the {argument} to run")
        for argument, count in (("samples", samples), ("batch", batch)):
            if count < 1:
                raise bad_argument(argument, "an integer >= 1", count, "ask for at least one prompt")
        self._name, self._model, self._samples, self._batch = name, model, samples, batch
        self._tokenizer = copy.deepcopy(tokenizer)  # lm-eval gives it a padding token
        self._load, self._metric, self._cut = load, metric, cut
        prefills = math.ceil(samples / batch)
        self._cases = [Case(f"{task}-{tokens}", tokens, {"task": task}, prefills) for tokens in lengths for task in tasks]
        self._task: tuple[str, Any] | None = None

    @property
    def name(self) -> str:
        return self._name

    def cases(self) -> Sequence[Case]:
        return self._cases

    def run(self, case: Case, what: What, watcher: Watcher) -> Record:
        """See :class:`stem_attention.evaluation.measure.Measure`; ``watcher`` is told about prefills only.

        The record's ``sample_scores`` are in the order of the prompts, the same for every contender. ``density`` is the mean
        over layers and prompts, 1 for a layer that ran dense; ``sparse_share`` says how many did not. ``seconds`` is all the
        time, answers included; ``prefill_seconds`` is the time to the prompt's logits, mean over prompts.
        """
        from lm_eval import evaluate

        with quiet():
            task = self._task_of(case)
            host = self._host(case)
        meter = PrefillMeter()
        start = time.perf_counter()
        with quiet(), meter.attached(self._model, what, watcher):
            found = evaluate(host, {"tasks": {case.about["task"]: task}}, limit=self._samples, log_samples=True)
        seconds = time.perf_counter() - start
        return {
            **self._scores(case, found),
            **self._lengths(host, task),
            **meter.record(len(task.instances)),
            "seconds": seconds,
        }

    def _task_of(self, case: Case) -> Any:
        """The case's task; all contenders share it, so they read the same prompts."""
        if self._task is None or self._task[0] != case.key:
            self._task = case.key, self._load(case.about["task"], case.tokens)
            self._task[1].set_config(key="num_fewshot", value=0)
        return self._task[1]

    def _host(self, case: Case) -> Any:
        from lm_eval.models.huggingface import HFLM

        # lm-eval cuts what is longer than this. A prompt that it made for a length is never twice as long.
        longest = case.tokens if self._cut else 2 * case.tokens
        return HFLM(pretrained=self._model, tokenizer=self._tokenizer, max_length=longest, batch_size=self._batch)

    def _scores(self, case: Case, found: Any) -> Record:
        """lm-eval's own numbers: shares from 0 to 1, the standard error None for a single sample."""
        task, main = case.about["task"], self._metric(case.tokens)
        scores = {}
        for key, value in found["results"][task].items():
            metric, _, filtered = str(key).partition(",")
            if filtered and not metric.endswith("_stderr") and not metric.isdecimal():
                scores[metric] = value
        error = found["results"][task][f"{main}_stderr,none"]
        samples = [sample[main] for sample in found["samples"][task]]
        return {
            "score": found["results"][task][f"{main},none"],
            "stderr": error if isinstance(error, float) else None,
            "n": len(samples),
            "sample_scores": samples,
            "scores": scores,
        }

    @staticmethod
    def _lengths(host: Any, task: Any) -> Record:
        """Tokens of the longest prompt as it was read, and how many prompts lost their beginning."""
        longest = truncated = 0
        for instance in task.instances:
            prompt, options = instance.args
            tokens, room = len(host.tok_encode(prompt)), host.max_length - options["max_gen_toks"]
            longest, truncated = max(longest, min(tokens, room)), truncated + (tokens > room)
        return {"prompt_tokens": longest, "truncated": truncated}


def section(records: Sequence[Record]) -> Section:
    """The report's part about the tasks of one measure."""
    title = {"ruler": "RULER", "longbench": "LongBench"}[records[0]["measure"]]
    return Section(f"Tasks of {title}, through lm-eval", (_score_table(records), _mean_table(records)))


def _score_table(records: Sequence[Record]) -> Table:
    names = tuple(dict.fromkeys(record["contender"] for record in records))
    rows: dict[tuple[int, str], dict[str, str]] = {}
    for record in sorted(records, key=lambda record: int(record["tokens"])):
        error = "" if record["stderr"] is None else f" ± {100 * record['stderr']:.1f}"
        row = rows.setdefault((record["tokens"], record["task"]), {"n": str(record["n"])})
        row[record["contender"]] = f"{100 * record['score']:.1f}{error}"
    cells = tuple((str(tokens), task, row["n"], *(row.get(name, "") for name in names)) for (tokens, task), row in rows.items())
    cut = sum(record["truncated"] for record in records if record["contender"] == names[0])
    note = "Scores from 0 to 100, ± lm-eval's standard error." + (f" {cut} prompts lost their beginning to fit." if cut else "")
    return Table("Scores by task", ("tokens", "task", "n", *names), cells, note)


def _mean_table(records: Sequence[Record]) -> Table:
    """All tasks of a length together, each contender on the tasks that it and dense have both run."""
    cells: dict[tuple[int, str], dict[str, Record]] = {}
    for record in sorted(records, key=lambda record: int(record["tokens"])):
        cells.setdefault((record["tokens"], record["contender"]), {})[record["task"]] = record
    rows = []
    for (tokens, name), part in cells.items():
        dense = cells.get((tokens, DENSE), {})
        paired = [
            mine - yours
            for task, record in part.items()
            if task in dense
            for mine, yours in zip(record["sample_scores"], dense[task]["sample_scores"], strict=True)
        ]
        rows.append((
            str(tokens), name,
            f"{fmean(record['density'] for record in part.values()):.3f}",
            f"{fmean(record['sparse_share'] for record in part.values()):.1%}",
            str(len(part)), f"{100 * fmean(record['score'] for record in part.values()):.1f}",
            mean_interval(paired).text(lambda x: f"{100 * x:+.1f}") if paired and name != DENSE else "",
            f"{fmean(record['prefill_seconds'] for record in part.values()):.2f}",
            f"{sum(record['seconds'] for record in part.values()):.1f}",
        ))  # fmt: skip
    columns = (
        "tokens", "contender", "density", "sparse layers", "tasks", "mean score", "minus dense, points", "prefill seconds",
        "seconds in all",
    )  # fmt: skip
    note = (
        "Mean score: over tasks, each counting the same. Its difference from dense: over all prompts of all tasks, prompt by "
        "prompt, with Student's 95 % interval."
    )
    return Table("All tasks of a length", columns, tuple(rows), note)
