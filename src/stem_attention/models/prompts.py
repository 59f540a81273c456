"""Long prompts with planted facts and a question about them, made from seeded templates.

The wording of facts and questions is that of RULER's needle tasks, which the smallest models still answer.
"""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from itertools import cycle

from stem_attention.errors import bad_argument, nearest
from stem_attention.models.load import Tokenizer, reason

_OPENING = "{} hidden in the text below. Read it with care, for I will ask you about the {} afterwards."
_ONE, _SEVERAL = ("A special magic number is", "number"), ("Some special magic numbers are", "numbers")

# One fact; one fact among competing ones; all values of one name; several facts at once.
KINDS = ("single", "multikey", "multivalue", "multiquery")

# Words by their place in a sentence, and the sentences.
_VILLAGE = json.loads(files(__package__).joinpath("village.json").read_text(encoding="utf-8"))

_COLOURS = ("amber", "scarlet", "silver", "cobalt", "emerald", "ivory", "violet", "copper")
_THINGS = ("lantern", "compass", "orchard", "harbour", "falcon", "violin", "anchor", "meadow")


def haystack_sentences(seed: int | str) -> Iterator[str]:
    """Make up village prose without end, the same for the same ``seed``; verbatim repeats are rare."""
    rng, choices = random.Random(seed), _VILLAGE["words"]
    while True:
        words = {slot: rng.choice(choices[slot]) for slot in choices}
        words["who2"] = rng.choice([name for name in choices["who"] if name != words["who"]])
        sentence = rng.choice(_VILLAGE["templates"]).format(**words)
        start = sentence.index(next(letter for letter in sentence if letter.isalpha()))
        yield sentence[:start] + sentence[start].upper() + sentence[start + 1 :]


def file_sentences(text: str, seed: int | str) -> Iterator[str]:
    """Read the sentences of a text without end, from one that ``seed`` decides on and again from its start after its end."""
    sentences = _split(text)
    if not sentences[0]:
        raise bad_argument("haystack", "a text with sentences", "an empty one", "name another file")
    first = random.Random(seed).randrange(len(sentences))
    yield from cycle([*sentences[first:], *sentences[:first]])


@lru_cache(maxsize=1)  # every prompt of a grid is cut from the same text, which may be megabytes
def _split(text: str) -> tuple[str, ...]:
    return tuple(re.split(r"(?<=[.!?])\s+", " ".join(text.split())))


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it; all but its tokens is empty when there is no planted fact."""

    ids: list[int]  # chat template included
    answers: tuple[str, ...] = ()  # numbers that a right answer contains
    answer_prefix: str = ""  # start of the reply, already part of the tokens
    places: tuple[float, ...] = ()  # where each answer stands: 0 at the start of the text, 1 at its end

    @property
    def answer(self) -> str | None:
        return self.answers[0] if self.answers else None


def chat_ids(tokenizer: Tokenizer, message: str, answer_prefix: str = "", use_template: bool = True) -> list[int]:
    """Tokenize one user message in the model's chat format (as it is, if the tokenizer has none), then ``answer_prefix``."""
    if not use_template or not tokenizer.chat_template:
        text = f"{message}\n{answer_prefix}" if answer_prefix else message
        return list(tokenizer(text).input_ids)
    messages = [{"role": "user", "content": message}]
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the model's author
        fix = "go without it: --no-chat-template, or use_template=False"
        raise bad_argument("chat template", "one that takes a user message", f"an error ({reason(error)})", fix) from error
    return list(tokenizer(f"{rendered}{answer_prefix}", add_special_tokens=False).input_ids)


def make_riddle(kind: str, seed: int | str, depth: float, count: int) -> tuple[list[tuple[str, str, float]], int]:
    """Draw facts to plant, name, number and place: ``count``, or one for the kind ``"single"``; and how many are asked for.

    These come first. The first fact stands at ``depth``; the others follow at equal distances and go on at the text's start.
    """
    if kind not in KINDS:
        raise bad_argument("kind", f"one of {', '.join(KINDS)}", repr(kind), nearest(kind, KINDS, "pick one of these names"))
    if not 0 <= depth <= 1:
        raise bad_argument("depth", "a number from 0 to 1", depth, "0 plants the fact at the start, 1 at the end")
    if not 1 <= count <= len(_COLOURS) * len(_THINGS):
        raise bad_argument("count", f"1 to {len(_COLOURS) * len(_THINGS)}", count, "plant fewer facts")
    rng, count = random.Random(seed), 1 if kind == "single" else count
    names, numbers = list[str](), list[str]()
    while len(numbers) < count:
        name, number = f"{rng.choice(_COLOURS)}-{rng.choice(_THINGS)}", str(rng.randrange(1_000_000, 10_000_000))
        if name not in names and number not in numbers:
            names.append(names[0] if names and kind == "multivalue" else name)
            numbers.append(number)
    places = [depth, *((depth + index / count) % 1 for index in range(1, count))]
    return list(zip(names, numbers, places, strict=True)), 1 if kind in ("single", "multikey") else count


def planted_prompt(
    tokenizer: Tokenizer,
    tokens: int,
    *,
    seed: int | str = 0,  # decides the text, the numbers and what they are called
    depth: float = 0.5,  # of the (first) asked fact: 0 at the start of the text, 1 at its end
    kind: str = "single",  # one of KINDS
    count: int = 1,  # facts in all, for every kind but "single"
    haystack: str | None = None,  # text whose sentences lie around the facts; None for made-up prose
    use_template: bool = True,  # that of the tokenizer for chats, if it has one
    answer: int = 0,  # tokens of these that are left to the answer
) -> Prompt:
    """Make a prompt of at most ``tokens`` tokens (and close to it) that hides numbers and asks for one or all of them."""
    facts, asked = make_riddle(kind, seed, depth, count)
    opening = _OPENING.format(*(_ONE if len(facts) == 1 else _SEVERAL))
    *names, last = dict.fromkeys(name for name, *_ in facts[:asked])
    what = f"for {', '.join(names)}{' and ' if names else ''}{last} mentioned in the provided text"
    question, prefix = f"What is the special magic number {what}?", f"The special magic number {what} is"
    if asked > 1:
        question, prefix = f"What are all the special magic numbers {what}?", f"The special magic numbers {what} are"

    def build(sentences: list[str]) -> list[int]:
        planted = list(sentences)
        for name, number, place in sorted(facts, key=lambda fact: fact[2], reverse=True):
            planted.insert(round(place * len(sentences)), f"One of the special magic numbers for {name} is: {number}.")
        return chat_ids(tokenizer, f"{opening}\n{' '.join(planted)}\n{question}", prefix, use_template)

    least, room = len(build([])), tokens - answer
    if least > room:
        beside = f" and {answer} tokens of answer" if answer else ""
        raise bad_argument("tokens", f"at least {least + answer} for the question alone{beside}", tokens, "give it more")
    sentences, used = [], least
    for sentence in haystack_sentences(seed) if haystack is None else file_sentences(haystack, seed):
        used += len(tokenizer(f" {sentence}", add_special_tokens=False).input_ids)
        if used > room:
            break
        sentences.append(sentence)
    while len(ids := build(sentences)) > room:  # tokens merge differently inside the whole text
        sentences.pop()
    _, numbers, places = zip(*facts[:asked], strict=True)
    return Prompt(ids, numbers, prefix, places)
