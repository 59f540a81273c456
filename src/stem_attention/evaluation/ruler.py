"""The measure ``ruler``: RULER as lm-eval makes and scores it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stem_attention.errors import bad_argument
from stem_attention.evaluation.lm_host import check_tasks, load_task, need_packages, quiet
from stem_attention.evaluation.lm_tasks import LmTasks
from stem_attention.evaluation.ruler_data import ESSAYS, HOTPOT, SQUAD, check_data, imported
from stem_attention.evaluation.ruler_prompts import MAX_SAMPLES, Maker, TaskSource

MIN_LENGTH = 1024
"""Shortest prompts: the questions themselves take some hundred tokens."""

TASKS = {
    "niah_single_1": TaskSource("niah_utils", "niah_single_1"),
    "niah_single_2": TaskSource("niah_utils", "niah_single_2", ESSAYS),
    "niah_single_3": TaskSource("niah_utils", "niah_single_3", ESSAYS),
    "niah_multikey_1": TaskSource("niah_utils", "niah_multikey_1", ESSAYS),
    "niah_multikey_2": TaskSource("niah_utils", "niah_multikey_2"),
    "niah_multikey_3": TaskSource("niah_utils", "niah_multikey_3"),
    "niah_multivalue": TaskSource("niah_utils", "niah_multivalue", ESSAYS),
    "niah_multiquery": TaskSource("niah_utils", "niah_multiquery", ESSAYS),
    "ruler_vt": TaskSource("vt_utils", "get_vt_dataset"),
    "ruler_cwe": TaskSource("cwe_utils", "get_cw_dataset"),
    "ruler_fwe": TaskSource("fwe_utils", "fwe_download"),
    "ruler_qa_squad": TaskSource("qa_utils", "get_squad", SQUAD),
    "ruler_qa_hotpot": TaskSource("qa_utils", "get_hotpotqa", HOTPOT),
}

OFFLINE = tuple(name for name, source in TASKS.items() if source.file is None)
"""The tasks that need no data."""


def ruler(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    samples: int,
    *,
    tasks: Sequence[str] | None = None,
    data: Path | None = None,
    seed: int = 0,
    batch: int = 1,
) -> LmTasks:
    """Build the measure; everything that a task needs is there when this returns.

    Args:
        model: Loaded by :func:`stem_attention.evaluation.models.load_model`.
        tokenizer: Its tokenizer.
        lengths: Tokens of prompt and answer together, at least :data:`MIN_LENGTH`.
        samples: Prompts of each task at each length, at most lm-eval's 500.
        tasks: Among :data:`TASKS`; unless given, all with ``data`` and :data:`OFFLINE` without.
        data: A folder with the files of the tasks that need some; without it lm-eval fetches what they need.
        seed: 0 makes the prompts that lm-eval makes of a task and length alone.
        batch: Prompts read together.

    Raises:
        ValueError: A task, length or count is bad, or ``data`` lacks a file.
        UnsupportedError: A package or the data of a task cannot be had; the message says what to do.
    """
    need_packages("nltk", "scipy", "wonderwords")
    names = (OFFLINE if data is None else tuple(TASKS)) if tasks is None else tuple(tasks)
    check_tasks(names, TASKS)
    if min(lengths, default=MIN_LENGTH) < MIN_LENGTH:
        raise bad_argument("lengths", f"integers >= {MIN_LENGTH}", min(lengths), "RULER has no shorter prompts")
    if samples > MAX_SAMPLES:
        raise bad_argument("samples", f"at most {MAX_SAMPLES}", samples, "lm-eval makes no more prompts of a task")
    with quiet():
        for name in names:
            check_data(name, TASKS[name].file, data)
    maker = Maker(tokenizer, samples, seed, data)

    def load(name: str, tokens: int) -> Any:
        imported("niah_utils")  # lm-eval would import it itself, and try a download
        changes = {
            "custom_dataset": lambda **options: maker.make(TASKS[name], tokens),
            # lm-eval knows some lengths only, and for them no standard errors.
            "metric_list": [{"metric": str(tokens), "aggregation": "mean", "higher_is_better": True}],
        }
        return load_task("ruler", name, changes)

    return LmTasks("ruler", model, tokenizer, names, lengths, samples, load, str, cut=False, batch=batch)
