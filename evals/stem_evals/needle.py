"""Numbers hidden in a long prompt: does the model still find them, by their depth and the prompt's length?"""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stem_attention.errors import bad_argument
from stem_attention.models.prefill import read
from stem_attention.models.prompts import Prompt, make_riddle, planted_prompt
from stem_attention.models.texts import Text
from stem_attention.policies import Policy
from stem_evals.measure import Case, Record, of_prefill

ANSWER_TOKENS = 24
"""Longest answer for each number: 7 digits at one token per digit, with room for a name or some words beside it."""

_NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+(?!\d)|\d+")
_COMPLETE = re.compile(rf"(?:{_NUMBER.pattern})(?=[^\d,]|,[^\d])")
_LIST_MARK = re.compile(r"^\s*\d{1,2}[.)](?=\s|$)", re.MULTILINE)


def try_prompt(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, policy: Policy | None) -> Record:
    """Let a model answer greedily, until its numbers are complete.

    Args:
        model: Loaded by :func:`stem_attention.models.load.load_model`.
        tokenizer: Its tokenizer.
        prompt: Made by :func:`stem_attention.models.prompts.planted_prompt`.
        policy: What to prefill with; None for the host's own dense attention.

    Returns:
        ``planted``, the numbers asked for; ``places``, where each stood, 0 at the start of the text, 1 at its end;
        ``answer``, after the given start of the reply; ``hits``, for each number whether it is among the answer's first
        numbers, of which as many count as were asked for; ``found``, whether all are, and ``share``, how many.

    Raises:
        ValueError: The prompt hides nothing.
    """
    count = len(prompt.answers)
    if not count:
        raise bad_argument("prompt", "one with planted numbers", "one without", "make it with planted_prompt")

    def text(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    reading = read(
        model, prompt.ids, policy, dense_below=0, positions=1, max_new_tokens=ANSWER_TOKENS * count,
        is_done=lambda tokens: complete_numbers(text(tokens)) >= count,
    )  # fmt: skip
    answer = text(reading.tokens).strip()
    given = numbers(answer)[:count]
    hits = [number in given for number in prompt.answers]
    return {
        "prompt_tokens": len(prompt.ids),
        "planted": list(prompt.answers),
        "places": list(prompt.places),
        "answer": answer,
        "hits": hits,
        "found": all(hits),
        "share": sum(hits) / count,
        **of_prefill(reading),
    }


def numbers(answer: str) -> list[str]:
    """The runs of digits in a text, commas between thousands and the marks of a numbered list left out."""
    return [match.replace(",", "") for match in _NUMBER.findall(_LIST_MARK.sub("", answer))]


def complete_numbers(answer: str) -> int:
    """How many numbers stand in an answer that no continuation can change."""
    return len(_COMPLETE.findall(_LIST_MARK.sub("", answer)))


class Needle:
    """A grid of kinds, lengths and depths; see :class:`stem_evals.measure.Measure`.

    Args:
        model: Loaded by :func:`stem_attention.models.load.load_model`.
        tokenizer: Its tokenizer.
        kinds: Among :data:`stem_attention.models.prompts.KINDS`.
        lengths: Tokens of prompt and answer together.
        depths: Where the first asked number stands, each from 0 to 1.
        samples: Prompts in each cell of the grid, no two with the same text or numbers.
        seed: Of the whole grid.
        count: Facts in a prompt, for every kind but ``"single"``.
        haystack: Text around the facts; made-up prose unless given.
        use_template: Use the tokenizer's chat template if it has one.

    Raises:
        ValueError: A kind, depth or count is bad, or a length is too short.
    """

    name = "needle"

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kinds: Sequence[str], lengths: Sequence[int],
        depths: Sequence[float], samples: int, *, seed: int = 0, count: int = 4, haystack: Text | None = None,
        use_template: bool = True,
    ) -> None:  # fmt: skip
        self._model, self._tokenizer, self._haystack = model, tokenizer, haystack
        text = None if haystack is None else {"name": haystack.name, "sha256": haystack.sha256}
        self.settings: Record = {"seed": seed, "count": count, "haystack": text, "use_template": use_template}
        self._cases = [
            Case(f"{kind}-{tokens}-{depth:g}-{sample}", tokens, {"kind": kind, "depth": depth, "sample": sample})
            for tokens in lengths
            for sample in range(samples)  # whole grids one after the other, so that a run cut short has them even
            for kind in kinds
            for depth in depths
        ]
        self._prompt: tuple[str, Prompt] | None = None
        # What is wrong is found out now and not in the middle of a run.
        for kind in kinds:
            for depth in depths:
                make_riddle(kind, seed, depth, count)
            self._make(min((case for case in self._cases if case.about["kind"] == kind), key=lambda case: case.tokens))

    def cases(self) -> Sequence[Case]:
        return self._cases

    def run(self, case: Case, policy: Policy | None) -> Record:
        """See :func:`try_prompt`."""
        if self._prompt is None or self._prompt[0] != case.key:
            self._prompt = case.key, self._make(case)
        return try_prompt(self._model, self._tokenizer, self._prompt[1], policy)

    def _make(self, case: Case) -> Prompt:
        kind, settings = case.about["kind"], self.settings
        asked = settings["count"] if kind in ("multivalue", "multiquery") else 1
        return planted_prompt(
            self._tokenizer,
            case.tokens,
            seed=f"{settings['seed']} {case.key}",
            depth=case.about["depth"],
            kind=kind,
            count=settings["count"],
            haystack=None if self._haystack is None else self._haystack.content,
            use_template=settings["use_template"],
            answer=ANSWER_TOKENS * asked,
        )
