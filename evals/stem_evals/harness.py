"""RULER and LongBench: lm-eval makes the prompts, lets the model answer and scores it; transformers brings the policy in."""

from __future__ import annotations

import copy
import io
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stem_attention.errors import UnsupportedError, bad_argument, nearest
from stem_attention.integrations import transformers as stem_host
from stem_attention.models.prefill import SPARSE, default_attention
from stem_attention.policies import Policy
from stem_evals.measure import Case, Record

OFFLINE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
"""RULER's tasks that need no data. The others hide their facts in essays, or ask questions of SQuAD and HotpotQA."""
LEAST = 4096
"""Tokens of RULER's shortest prompts."""


class Harness:
    """Tasks of lm-eval at some lengths, a case each; see :class:`stem_evals.measure.Measure`.

    Args:
        name: ``"ruler"`` or ``"longbench"``.
        model: Loaded by :func:`stem_attention.models.load.load_model`.
        tokenizer: Its tokenizer.
        lengths: Tokens of prompt and answer together; RULER makes such prompts, LongBench's lose their beginning to fit.
        samples: Prompts of each task at each length: the first ones, or all if there are fewer.
        tasks: lm-eval's names; unless given, RULER's that need no data, and all of LongBench.
        data: A folder with LongBench's files, in place of the hub.
        seed: Of RULER's prompts; 0 seeds as lm-eval does.

    Raises:
        ValueError: A task, length or count is bad.
        UnsupportedError: The data of a task cannot be had.
    """

    def __init__(
        self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], samples: int,
        tasks: Sequence[str] | None = None, data: Path | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        self.name, self._model, self._samples, self._data, self._seed = name, model, samples, data, seed
        self._tokenizer = copy.deepcopy(tokenizer)  # lm-eval gives it a padding token
        self.settings = {"samples": samples, "seed": seed}
        known = [task for task in self._manager().all_subtasks if not task.endswith("_e")]
        chosen = tasks or (known if name == "longbench" else OFFLINE)
        if unknown := sorted(set(chosen) - set(known)):
            raise bad_argument(
                "tasks", f"among {', '.join(known)}", ", ".join(unknown), nearest(unknown[0], known, "pick among these names")
            )
        if name == "ruler" and min(lengths) < LEAST:
            raise bad_argument("lengths", f"at least {LEAST} tokens", min(lengths), "RULER has no shorter prompts")
        self._cases = [Case(f"{task}-{tokens}", tokens, {"task": task}) for tokens in lengths for task in chosen]
        self._task: tuple[str, Any] | None = None
        for task in chosen:
            if task not in OFFLINE:  # what cannot be had is found out now and not in the middle of a run
                self._load(task, LEAST)

    def cases(self) -> Sequence[Case]:
        return self._cases

    def run(self, case: Case, policy: Policy | None) -> Record:
        """The record's ``sample_scores`` are those of the prompts whose hashes ``docs`` gives; ``seconds`` is all the time."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        name, calls, start = case.about["task"], list[stem_host.LayerCall](), time.perf_counter()
        if self._task is None or self._task[0] != case.key:  # all contenders read the same prompts, which take long to make
            self._task = case.key, self._load(name, case.tokens)
        longest = case.tokens if self.name == "longbench" else 2 * case.tokens  # lm-eval cuts what is longer

        used = nullcontext() if policy is None else stem_host.use_policy(policy, dense_below=0, observer=calls.append)
        self._model.set_attn_implementation(default_attention(self._model) if policy is None else SPARSE)
        with _quiet(), used:
            host = HFLM(pretrained=self._model, tokenizer=self._tokenizer, max_length=longest, batch_size=1)
            found: Any = simple_evaluate(host, tasks=[self._task[1]], task_manager=self._manager(), limit=self._samples)
        samples = sorted(found["samples"][name], key=lambda sample: int(sample["doc_id"]))
        scores = [float(sample["score" if self.name == "longbench" else str(case.tokens)]) for sample in samples]
        prefills = [call for call in calls if call.q_len > 1]
        return {
            "score": fmean(scores),
            "n": len(scores),
            "sample_scores": scores,
            "docs": [sample["doc_hash"][:16] for sample in samples],
            "density": fmean(call.density for call in prefills) if prefills else 1.0,
            "sparse_share": fmean(float(call.sparse) for call in prefills) if prefills else 0.0,
            "seconds": time.perf_counter() - start,
        }

    def _manager(self, **metadata: Any) -> Any:
        with _quiet():
            from lm_eval import tasks

            # The rest of lm-eval's tasks is not searched, which would take seconds.
            folder = Path(tasks.__path__[0], self.name)
            return tasks.TaskManager(include_path=str(folder), include_defaults=False, metadata=metadata)

    def _load(self, name: str, tokens: int) -> Any:
        """lm-eval's task with its prompts, the same in every process.

        Raises:
            UnsupportedError: lm-eval could not read its data.
        """
        # Its words are shuffled by a generator that lives as long as its module: each task starts with a new one.
        sys.modules.pop("lm_eval.tasks.ruler.cwe_utils", None)
        random.seed(self._seed)
        np.random.seed(1234 + self._seed)  # noqa: NPY002  # lm-eval draws from numpy's global generator
        changes = {} if self._data is None or self.name == "ruler" else {"dataset_path": str(self._data)}
        # Importing them starts a download, in vain for half a minute where there is no network, which these do not need.
        fetch = mock.patch("nltk.download") if name in OFFLINE else nullcontext()
        with tempfile.TemporaryDirectory() as directory, _quiet(), fetch:
            self._tokenizer.save_pretrained(directory)
            manager = self._manager(tokenizer=directory, max_seq_lengths=[tokens])
            try:
                # lm-eval takes changes to a task that it knows only from a group.
                return manager.load([{"group": "changed", "task": [{"task": name, **changes}]}])["tasks"][name]
            except (OSError, LookupError, ValueError) as error:
                reason = (str(error).strip().splitlines() or [""])[0]
                raise UnsupportedError(
                    f"{name}: lm-eval could not make its prompts ({type(error).__name__}: {reason}); tasks with data need the "
                    "network once, afterwards HF_HOME and NLTK_DATA keep what was fetched; LongBench may lie in --data"
                ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's bars, prints and advice off the terminal, where they would tear the caller's progress bars."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
