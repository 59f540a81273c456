"""The measure ``longbench``: LongBench as lm-eval prompts and scores it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stem_attention.errors import UnsupportedError
from stem_attention.evaluation.lm_host import check_tasks, load_task, need_packages, quiet
from stem_attention.evaluation.lm_tasks import LmTasks, Load

DATASET = "Xnhyacinth/LongBench"
"""The hub's copy that lm-eval reads; a folder given instead holds the same files."""

TASKS = tuple(
    f"longbench_{name}"
    for name in (
        "narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh",
        "hotpotqa", "2wikimqa", "musique", "dureader",
        "gov_report", "qmsum", "multi_news", "vcsum",
        "trec", "triviaqa", "samsum", "lsht",
        "passage_count", "passage_retrieval_en", "passage_retrieval_zh",
        "lcc", "repobench-p",
    )
)  # fmt: skip


def longbench(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    samples: int,
    *,
    tasks: Sequence[str] | None = None,
    data: Path | None = None,
    batch: int = 1,
) -> LmTasks:
    """Build the measure; the data of every task is there when this returns.

    Args:
        model: Loaded by :func:`stem_attention.evaluation.models.load_model`.
        tokenizer: Its tokenizer.
        lengths: Most tokens of prompt and answer together: what is longer loses its beginning, as lm-eval does it.
        samples: Prompts of each task at each length.
        tasks: Among :data:`TASKS`, all unless given.
        data: A folder with the files of :data:`DATASET`; without it they come from the hub, or from its cache (HF_HOME).
        batch: Prompts read together.

    Raises:
        ValueError: A task or count is bad.
        UnsupportedError: A package or the data of a task cannot be had; the message says what to do.
    """
    need_packages("jieba", "fuzzywuzzy", "rouge")
    names = TASKS if tasks is None else tuple(tasks)
    check_tasks(names, TASKS)

    def load(name: str, tokens: int) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what lm-eval's metrics import
            return load_task("longbench", name, {} if data is None else {"dataset_path": str(data)})

    with quiet():
        for name in names:
            _check_data(name, load, data)
    return LmTasks("longbench", model, tokenizer, names, lengths, samples, load, lambda tokens: "score", cut=True, batch=batch)


def _check_data(name: str, load: Load, data: Path | None) -> None:
    try:
        load(name, 0)
    except (OSError, ValueError) as error:
        place = DATASET if data is None else str(data)
        raise UnsupportedError(
            f"{name} needs {name.removeprefix('longbench_')} of {place}, which cannot be loaded ({type(error).__name__}); give "
            f"a folder with the files of {DATASET}, or run where the hub is within reach; HF_HOME keeps what was fetched"
        ) from error
