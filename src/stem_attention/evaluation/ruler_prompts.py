"""RULER's prompts: lm-eval's own code makes them, as many as are wanted, sized by the tokenizer in hand."""

from __future__ import annotations

import importlib.util
import json
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from stem_attention.errors import bad_argument
from stem_attention.evaluation.ruler_data import ESSAYS, PACKAGE, imported

MAX_SAMPLES = 500
"""What lm-eval makes of each task at each length."""

_SAMPLERS = {  # of each of its modules, the function that makes the prompts
    "niah_utils": "generate_samples",
    "vt_utils": "sys_vartrack_w_noise_random",
    "cwe_utils": "sys_word_pair_random",
    "fwe_utils": "sys_kwext",
    "qa_utils": "generate_samples",
}
_EXAMPLE_TOKENS = 500  # of variable tracking's worked example
_ANSWER_TOKENS = {"vt_utils": 30, "cwe_utils": 120}


@dataclass(frozen=True)
class TaskSource:
    """Where lm-eval makes the prompts of a task: a module, its function, and the data file that it needs."""

    module: str
    function: str
    file: str | None = None


@dataclass(frozen=True)
class Maker:
    """Has lm-eval make prompts.

    Attributes:
        tokenizer: Measures them.
        samples: How many of each task and length. They are the first of those that lm-eval would make.
        seed: 0 seeds as lm-eval does.
        data: Folder with the files that tasks need; without it lm-eval fetches the data, once in a process.
    """

    tokenizer: PreTrainedTokenizerBase
    samples: int
    seed: int
    data: Path | None

    def make(self, source: TaskSource, tokens: int) -> Any:
        """The prompts of one task and length, as lm-eval's data set.

        Raises:
            ValueError: The length is too short for the task.
        """
        with _seeded(self.seed):
            _check_room(source.module, self.tokenizer, tokens)
        module = _private(source.module)
        name = _SAMPLERS[source.module]
        sampler = getattr(module, name)

        def fewer(*args: Any, num_samples: int = MAX_SAMPLES, **options: Any) -> Any:
            return sampler(*args, num_samples=min(num_samples, self.samples), **options)

        setattr(module, name, fewer)
        module.get_tokenizer = lambda name: self.tokenizer
        if source.file is not None:
            self._give_data(module, source.file)
        with _seeded(self.seed):
            return getattr(module, source.function)(max_seq_lengths=[tokens])

    def _give_data(self, module: Any, file: str) -> None:
        if self.data is not None:
            content = json.loads((self.data / file).read_text(encoding="utf-8"))
            if file == ESSAYS:
                module.get_haystack = lambda type_haystack: re.sub(r"\s+", " ", content["text"]).split(" ")
            else:
                module.download_json = lambda url: content
        elif file != ESSAYS:
            module.download_json = imported("qa_utils").download_json  # the original, which keeps what it fetched


def _private(module: str) -> Any:
    """A fresh copy: its generator of random words starts anew, and what is changed in it stays in it."""
    imported(module)
    spec = importlib.util.find_spec(f"{PACKAGE}.{module}")
    assert spec is not None  # it has just been imported
    assert spec.loader is not None
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    return copied


def _check_room(name: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> None:
    """Make sure that the smallest prompts fit: where they do not, two of lm-eval's modules look for others for ever."""
    if name not in _ANSWER_TOKENS:
        return
    module = _private(name)
    if name == "vt_utils":
        smallest = [(module.generate_input_output(noises, 1, 4)[0], room) for noises, room in _tracking_sizes(tokens)]
    else:
        smallest = [(module.generate_input_output(10, tokens)[1], tokens)]
    for text, room in smallest:
        needed = len(tokenizer(text).input_ids) + _ANSWER_TOKENS[name]
        if 1.1 * needed > room:  # prompts differ a little
            got = f"{tokens}, of which {room} for a prompt that takes about {needed} with this tokenizer"
            raise bad_argument("lengths", "room for the smallest prompt", got, "ask for more tokens or leave the task out")


def _tracking_sizes(tokens: int) -> list[tuple[int, int]]:
    """Lines of noise in the smallest worked example and in the smallest prompt, and the tokens that each may take."""
    return [(5, _EXAMPLE_TOKENS), (10, tokens - _EXAMPLE_TOKENS)]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global generators, from which lm-eval draws, seeded as it seeds them; put back afterwards."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    numbers: Any = np.random
    before, numbers_before = random.getstate(), numbers.get_state()
    random.seed(DEFAULT_RANDOM_SEED + seed)
    numbers.seed(DEFAULT_OTHER_SEED + seed)
    try:
        yield
    finally:
        random.setstate(before)
        numbers.set_state(numbers_before)
