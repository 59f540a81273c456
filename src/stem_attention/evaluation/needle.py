"""Whether a model still finds numbers hidden in a long prompt, by their depth and the prompt's length."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stem_attention.errors import bad_argument
from stem_attention.evaluation.measure import Case, Record, What
from stem_attention.evaluation.prefill import Watcher, read
from stem_attention.evaluation.prompts import KINDS, Prompt, planted_prompt
from stem_attention.evaluation.texts import Text

ANSWER_TOKENS = 24
"""Longest answer for each number: 7 digits at one token per digit, with room for a name or some words beside it."""

_NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+(?!\d)|\d+")
_COMPLETE = re.compile(rf"(?:{_NUMBER.pattern})(?=[^\d,]|,[^\d])")
_LIST_MARK = re.compile(r"^\s*\d{1,2}[.)](?=\s|$)", re.MULTILINE)


@dataclass(frozen=True)
class Settings:
    """What the prompts of a grid have in common.

    Attributes:
        seed: Of the whole grid.
        count: Facts in a prompt, for every kind but ``"single"``.
        haystack: Text around the facts; made-up prose unless given.
        use_template: Use the tokenizer's chat template if it has one.
    """

    seed: int = 0
    count: int = 4
    haystack: Text | None = None
    use_template: bool = True

    def to_dict(self) -> Record:
        """As plain types."""
        haystack = None if self.haystack is None else {"name": self.haystack.name, "sha256": self.haystack.sha256}
        return {**asdict(self), "haystack": haystack}


@dataclass(frozen=True)
class Trial:
    """What a model answered.

    Attributes:
        planted: The numbers asked for.
        places: Where each stood: 0 at the start of the text, 1 at its end.
        answer: The greedy answer after the given start of the reply.
        hits: Whether each number was found: it is among the answer's first numbers, of which as many count as were asked for.
        density: Kept share of the causal block pairs in the prefill, averaged over layers.
        seconds: Time to first token.
    """

    planted: tuple[str, ...]
    places: tuple[float, ...]
    answer: str
    hits: tuple[bool, ...]
    density: float
    seconds: float

    @property
    def found(self) -> bool:
        """Whether all were found."""
        return all(self.hits)

    @property
    def share(self) -> float:
        """Share of the numbers that were found."""
        return sum(self.hits) / len(self.hits)


def try_prompt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    what: What,
    *,
    on_attention: Watcher = lambda call: None,
) -> Trial:
    """Let a model answer greedily, until its numbers are complete.

    Args:
        model: Loaded by :func:`stem_attention.evaluation.models.load_model`.
        tokenizer: Its tokenizer.
        prompt: Made by :func:`stem_attention.evaluation.prompts.planted_prompt`.
        what: Stem's config or a policy to prefill with; None for the host's own dense attention.
        on_attention: Told about every attention call of the prefill.

    Raises:
        ValueError: The prompt hides nothing.
    """
    count = len(prompt.answers)
    if not count:
        raise bad_argument("prompt", "one with planted numbers", "one without", "make it with planted_prompt")

    def text(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    reading = read(
        model, prompt.ids, what, positions=1, max_new_tokens=ANSWER_TOKENS * count, on_attention=on_attention,
        is_done=lambda tokens: complete_numbers(text(tokens)) >= count,
    )  # fmt: skip
    answer = text(reading.tokens).strip()
    given = numbers(answer)[:count]
    hits = tuple(number in given for number in prompt.answers)
    return Trial(prompt.answers, prompt.places, answer, hits, reading.density, reading.seconds)


def numbers(answer: str) -> list[str]:
    """The runs of digits in a text, commas between thousands and the marks of a numbered list left out."""
    return [match.replace(",", "") for match in _NUMBER.findall(_LIST_MARK.sub("", answer))]


def complete_numbers(answer: str) -> int:
    """How many numbers stand in an answer that no continuation can change."""
    return len(_COMPLETE.findall(_LIST_MARK.sub("", answer)))


class Needle:
    """A grid of kinds, lengths and depths; see :class:`stem_attention.evaluation.measure.Measure`.

    Args:
        model: Loaded by :func:`stem_attention.evaluation.models.load_model`.
        tokenizer: Its tokenizer.
        kinds: Among :data:`stem_attention.evaluation.prompts.KINDS`.
        lengths: Tokens of prompt and answer together.
        depths: Where the first asked number stands, each from 0 to 1.
        samples: Prompts in each cell of the grid, no two with the same text or numbers.
        settings: What the prompts have in common.

    Raises:
        ValueError: A kind or depth is bad, ``samples`` is below 1, a length is too short, or there are more facts than names.
    """

    name = "needle"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        kinds: Sequence[str],
        lengths: Sequence[int],
        depths: Sequence[float],
        samples: int,
        settings: Settings,
    ) -> None:
        if samples < 1:
            raise bad_argument("samples", "an integer >= 1", samples, "ask for at least one prompt at every depth")
        for kind in kinds:
            if kind not in KINDS:
                raise bad_argument("kinds", f"among {', '.join(KINDS)}", repr(kind), "pick among these names")
        for depth in depths:
            if not 0 <= depth <= 1:
                raise bad_argument("depths", "numbers from 0 to 1", depth, "0 plants the fact at the start, 1 at the end")
        self._model, self._tokenizer, self._settings = model, tokenizer, settings
        self._cases = [
            Case(f"{kind}-{tokens}-{depth:g}-{sample}", tokens, {"kind": kind, "depth": depth, "sample": sample})
            for tokens in lengths
            for sample in range(samples)  # whole grids one after the other, so that a run cut short has them even
            for kind in kinds
            for depth in depths
        ]
        self._prompt: tuple[str, Prompt] | None = None
        for kind in kinds:  # too few tokens for a question are found out now and not in the middle of a run
            self._make(min((case for case in self._cases if case.about["kind"] == kind), key=lambda case: case.tokens))

    def cases(self) -> Sequence[Case]:
        return self._cases

    def run(self, case: Case, what: What, watcher: Watcher) -> Record:
        prompt = self._prompt_of(case)
        trial = try_prompt(self._model, self._tokenizer, prompt, what, on_attention=watcher)
        return {"prompt_tokens": len(prompt.ids), **asdict(trial), "found": trial.found, "share": trial.share}

    def _prompt_of(self, case: Case) -> Prompt:
        if self._prompt is None or self._prompt[0] != case.key:
            self._prompt = case.key, self._make(case)
        return self._prompt[1]

    def _make(self, case: Case) -> Prompt:
        kind, settings = case.about["kind"], self._settings
        asked = settings.count if kind in ("multivalue", "multiquery") else 1
        return planted_prompt(
            self._tokenizer,
            case.tokens - ANSWER_TOKENS * asked,
            seed=f"{settings.seed} {case.key}",
            depth=case.about["depth"],
            kind=kind,
            count=settings.count,
            haystack=None if settings.haystack is None else settings.haystack.content,
            use_template=settings.use_template,
        )
