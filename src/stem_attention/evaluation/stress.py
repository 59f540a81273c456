"""Whether a model trained for it answers questions about long synthetic prompts, which small public models cannot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from stem_attention.errors import bad_argument
from stem_attention.evaluation.intervals import share_difference_interval, share_interval
from stem_attention.evaluation.measure import Case, Record, Section, Table, What
from stem_attention.evaluation.prefill import Watcher, read
from stem_attention.evaluation.synthetic import ANSWER, TASKS, Marker, Prompt, Vocabulary, make_prompt

LAYOUT = "stress.json"
"""File beside a model's config.json that says which ids mean what."""

DENSE = "dense"


class Stress:
    """Tasks by lengths by seeds; see :class:`stem_attention.evaluation.measure.Measure`.

    Args:
        model: Made by ``benchmarks/train_stress.py``.
        vocabulary: Its own, from :func:`read_vocabulary`.
        tasks: Among :data:`stem_attention.evaluation.synthetic.TASKS`.
        lengths: Tokens of prompt and answer together.
        samples: Prompts of each task and length.
        seed: Of the first prompt; the others follow.

    Raises:
        ValueError: The vocabulary is not the model's, a task is unknown, a length too short or ``samples`` below 1.
    """

    name = "stress"

    def __init__(
        self,
        model: PreTrainedModel,
        vocabulary: Vocabulary,
        tasks: Sequence[str],
        lengths: Sequence[int],
        samples: int = 40,
        seed: int = 0,
    ) -> None:
        if model.config.vocab_size != vocabulary.size:
            got = f"{vocabulary.size} ids for a model of {model.config.vocab_size}"
            raise bad_argument("vocabulary", "the model's own", got, f"keep {LAYOUT} with the model that it came with")
        if samples < 1:
            raise bad_argument("samples", "an integer >= 1", samples, "ask for at least one prompt of every task")
        self._model, self._vocabulary = model, vocabulary
        self._cases = [
            Case(f"{task}-{tokens}-{sample}", tokens, {"task": task, "sample": sample})
            for tokens in lengths
            for sample in range(seed, seed + samples)  # all tasks in turn, so that a run cut short has them even
            for task in tasks
        ]
        self._prompt: tuple[str, Prompt] | None = None
        for task in tasks:  # what does not fit is found out now and not in the middle of a run
            make_prompt(task, min(lengths), seed, vocabulary)

    def cases(self) -> Sequence[Case]:
        return self._cases

    def run(self, case: Case, what: What, watcher: Watcher) -> Record:
        if self._prompt is None or self._prompt[0] != case.key:
            prompt = make_prompt(case.about["task"], case.tokens, case.about["sample"], self._vocabulary)
            self._prompt = case.key, prompt
        prompt = self._prompt[1]
        reading = read(
            self._model, prompt.ids, what, positions=1, max_new_tokens=ANSWER, on_attention=watcher,
            is_done=lambda tokens: tokens[-1] != prompt.answer[len(tokens) - 1],
        )  # fmt: skip
        return {
            "prompt_tokens": len(prompt.ids),
            "wanted": prompt.answer,
            "answer": reading.tokens,
            "found": reading.tokens == prompt.answer,
            "density": reading.density,
            "seconds": reading.seconds,
        }


def save_vocabulary(directory: Path, vocabulary: Vocabulary, facts: Mapping[str, Any]) -> None:
    """Write which ids mean what, and a tokenizer that spells them, beside a model.

    Args:
        directory: The model's.
        vocabulary: The model's.
        facts: How the model was made; plain JSON types.
    """
    layout = {"format": 1, "vocabulary": asdict(vocabulary), "tasks": {name: asdict(task) for name, task in TASKS.items()}}
    (directory / LAYOUT).write_text(json.dumps({**layout, **facts}, indent=1) + "\n", encoding="utf-8")
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(_spellings(vocabulary))}, unk_token="<0>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    make: Any = PreTrainedTokenizerFast  # which has no types
    make(tokenizer_object=inner, unk_token="<0>").save_pretrained(directory)


def read_vocabulary(directory: Path) -> Vocabulary:
    """The vocabulary of a model made by ``benchmarks/train_stress.py``.

    Raises:
        ValueError: The directory holds no such model, or one whose prompts were made differently.
    """
    file = directory / LAYOUT
    if not file.is_file():
        fix = "train one with benchmarks/train_stress.py"
        raise bad_argument("model", f"a directory with {LAYOUT}, as stress needs its own model", repr(str(directory)), fix)
    layout = json.loads(file.read_text(encoding="utf-8"))
    if layout["format"] != 1:
        raise bad_argument("model", f"{LAYOUT} of format 1", layout["format"], "use the version that trained it")
    return Vocabulary(**layout["vocabulary"])


def _spellings(vocabulary: Vocabulary) -> list[str]:
    markers = {int(marker): marker.name for marker in Marker}
    words = [markers.get(index, f"<{index}>") for index in range(vocabulary.MARKERS)]
    for kind, count in asdict(vocabulary).items():
        words += [f"{kind.removesuffix('s')}{index}" for index in range(count)]
    return words


def section(records: Sequence[Record]) -> Section:
    """The report's part about synthetic prompts."""
    from stem_attention.evaluation.stress_plots import draw_lengths

    return Section("Synthetic tasks", (_table(records),), (("stress", draw_lengths(records)),))


def _table(records: Sequence[Record]) -> Table:
    cells: dict[tuple[str, int, str], dict[str, Record]] = {}
    for record in records:
        cells.setdefault((record["task"], record["tokens"], record["contender"]), {})[record["case"]] = record
    order = {name: place for place, name in enumerate(dict.fromkeys(record["contender"] for record in records))}
    rows = []
    for (task, tokens, name), part in sorted(cells.items(), key=lambda cell: (*cell[0][:2], order[cell[0][2]])):
        found = [float(record["found"]) for record in part.values()]
        dense = cells.get((task, tokens, DENSE), {})
        paired = [float(record["found"] - dense[case]["found"]) for case, record in part.items() if case in dense]
        rows.append((
            task, str(tokens), name, f"{fmean(record['density'] for record in part.values()):.3f}",
            f"{sum(found):.0f} of {len(found)}", share_interval(found).text("{:.0%}".format),
            share_difference_interval(paired).text(lambda x: f"{100 * x:+.1f}") if paired and name != DENSE else "",
            f"{fmean(record['seconds'] for record in part.values()):.2f}",
        ))  # fmt: skip
    columns = ("task", "tokens", "contender", "density", "right", "share (Wilson)", "minus dense, points", "seconds")
    note = (
        "An answer is right when all of its tokens are. Intervals: 95 %, Wilson for the share, Bonett and Price for the "
        "difference from dense, prompt by prompt."
    )
    return Table("Answers right", columns, tuple(rows), note)
