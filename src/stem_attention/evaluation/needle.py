"""Whether a model still finds one number hidden in a long prompt."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stem_attention.config import StemConfig
from stem_attention.errors import bad_argument
from stem_attention.evaluation.prefill import Watcher, read
from stem_attention.evaluation.prompts import Prompt, planted_prompt
from stem_attention.policies import Policy

ANSWER_TOKENS = 24
"""Longest answer: a 7-digit number at one token per digit, with room for a word or two before it."""

_Z95 = 1.959963984540054


@dataclass(frozen=True)
class NeedleCase:
    """One prompt of :func:`needle_cases`."""

    depth: float
    seed: int
    prompt: Prompt


@dataclass(frozen=True)
class NeedleTrial:
    """What a model answered to one case.

    Attributes:
        depth: Where the number stood: 0 at the start of the text, 1 at its end.
        seed: The prompt's seed.
        tokens: The prompt's length.
        planted: The number.
        answer: The greedy answer after the given start of the reply.
        found: Whether the first number in the answer is the planted one, digit by digit.
        density: Kept share of the causal block pairs in the prefill, averaged over layers.
        seconds: Time to first token.
    """

    depth: float
    seed: int
    tokens: int
    planted: str
    answer: str
    found: bool
    density: float
    seconds: float


def needle_cases(
    tokenizer: PreTrainedTokenizerBase, tokens: int, depths: Sequence[float], per_depth: int, first_seed: int = 0
) -> list[NeedleCase]:
    """Prompts of about ``tokens`` tokens, ``per_depth`` at every depth, no two with the same text or number.

    Raises:
        ValueError: A depth lies outside 0 to 1, ``tokens`` is too few for the question, or ``per_depth`` is below 1.
    """
    if per_depth < 1:
        raise bad_argument("per_depth", "an integer >= 1", per_depth, "ask for at least one prompt at every depth")
    places = [depth for depth in depths for _ in range(per_depth)]
    return [
        NeedleCase(depth, seed, planted_prompt(tokenizer, tokens, seed=seed, depth=depth))
        for seed, depth in enumerate(places, first_seed)
    ]


def try_needle(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    case: NeedleCase,
    what: StemConfig | Policy | None,
    *,
    max_new_tokens: int = ANSWER_TOKENS,
    on_attention: Watcher = lambda call: None,
) -> NeedleTrial:
    """Let a model answer one case greedily.

    Args:
        model: Loaded by :func:`stem_attention.evaluation.models.load_model`.
        tokenizer: Its tokenizer.
        case: The prompt and what it hides.
        what: Stem's config or a policy to prefill with; None for the host's own dense attention.
        max_new_tokens: Longest answer.
        on_attention: Told about every attention call of the prefill.

    Raises:
        ValueError: The prompt hides nothing.
    """
    planted = case.prompt.answer
    if planted is None:
        raise bad_argument("case", "a prompt with a planted number", "one without", "make it with needle_cases")
    reading = read(model, case.prompt.ids, what, positions=1, max_new_tokens=max_new_tokens, on_attention=on_attention)
    answer = str(tokenizer.decode(reading.tokens, skip_special_tokens=True)).strip()
    return NeedleTrial(
        depth=case.depth,
        seed=case.seed,
        tokens=len(case.prompt.ids),
        planted=planted,
        answer=answer,
        found=first_number(answer) == planted,
        density=reading.density,
        seconds=reading.seconds,
    )


def first_number(answer: str) -> str | None:
    """The first run of digits in a text, commas between thousands left out; None if there is no digit."""
    match = re.search(r"\d{1,3}(?:,\d{3})+(?!\d)|\d+", answer)
    return match[0].replace(",", "") if match else None


def wilson_interval(hits: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % score interval for a share of ``hits`` in ``trials``.

    Raises:
        ValueError: There are no trials, or ``hits`` is not between 0 and their number.
    """
    if trials < 1:
        raise bad_argument("trials", "an integer >= 1", trials, "run at least one")
    if not 0 <= hits <= trials:
        raise bad_argument("hits", f"0 to {trials}", hits, "count the trials that succeeded")
    share, weight = hits / trials, _Z95**2 / trials
    centre = (share + weight / 2) / (1 + weight)
    half = math.sqrt(share * (1 - share) * weight + weight**2 / 4) / (1 + weight)
    return max(0.0, centre - half), min(1.0, centre + half)
