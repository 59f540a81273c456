"""Long-context tasks over a small made-up vocabulary, in the manner of RULER: drawn as tensors, thousands of rows a second.

A row is filler with statements and questions set into it. In training many questions stand anywhere behind what they ask
about; in evaluation there is one, at the end. The last question's answer ends the row in both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import IntEnum
from itertools import pairwise

import torch
from stress.rows import distinct, integers, later, place, sentences, uniform, write
from torch import Tensor

from stem_attention.errors import bad_argument

ANSWER = 3
"""Tokens of every answer."""

_RANKS = 64
_SKEW = 1.5


class Marker(IntEnum):
    """Ids that open a row, a statement or a question."""

    BEGIN = 1
    FACT = 2
    ASK = 3
    SET = 4
    VALUE = 5
    EDGE = 6
    GOAL = 7
    TOP = 8


@dataclass(frozen=True)
class Vocabulary:
    """How many ids there are of each kind; the kinds follow each other in this order, after 16 ids for markers."""

    keys: int = 768
    names: int = 1024
    values: int = 1024
    words: int = 256
    filler: int = 1008

    MARKERS = 16

    @property
    def size(self) -> int:
        """All ids."""
        return self.MARKERS + self.keys + self.names + self.values + self.words + self.filler

    def first(self, kind: str) -> int:
        """The lowest id of a kind, which is the name of a field."""
        counts: dict[str, int] = asdict(self)
        return self.MARKERS + sum(list(counts.values())[: list(counts).index(kind)])


@dataclass(frozen=True)
class Recipe:
    """What the rows of a batch hold.

    Attributes:
        task: One of :data:`TASKS`.
        length: Tokens of a row, the last answer included.
        share: Share of the tokens that statements (or counted words) take; fewer where names run out.
        questions: Questions in a row, the last of them at its end.
        links: Lookups between the asked name and the statement with the value (``variables`` and ``hops``).
        worked: Share of the links behind which the value is spelled out as an answer, for training.
    """

    task: str
    length: int
    share: float
    questions: int = 1
    links: int = 0
    worked: float = 0.0


@dataclass(frozen=True)
class Batch:
    """Rows of one recipe.

    Attributes:
        ids: int64 ``(rows, length)``.
        answers: int64 ``(rows, n)``: where each answer of :data:`ANSWER` tokens begins; -1 for one that what stands before
            it does not tell. The last column is the question at the end.
        depth: int64 ``(rows, n)``: links to follow from what is asked.
    """

    ids: Tensor
    answers: Tensor
    depth: Tensor


TASKS = {
    "recall": Recipe("recall", 0, share=0.25),
    "variables": Recipe("variables", 0, share=0.125, links=2),
    "frequent": Recipe("frequent", 0, share=0.5),
    "hops": Recipe("hops", 0, share=0.125, links=1),
}
"""The tasks as they are evaluated; the length is set for every prompt."""


@dataclass(frozen=True)
class Prompt:
    """One evaluation prompt and the only right continuation."""

    ids: list[int]
    answer: list[int]


def make_prompt(task: str, length: int, seed: int, vocabulary: Vocabulary) -> Prompt:
    """The prompt of a task. It does not depend on the device that the model runs on.

    Args:
        task: One of :data:`TASKS`.
        length: Tokens of prompt and answer together.
        seed: Of this one prompt.
        vocabulary: The model's.

    Raises:
        ValueError: There is no such task, or ``length`` is too short for it.
    """
    if task not in TASKS:
        raise bad_argument("task", f"one of {', '.join(TASKS)}", repr(task), "name one of these")
    known = TASKS[task]
    recipe = Recipe(task, length, known.share, links=known.links)
    generator = torch.Generator().manual_seed(1_000_003 * seed + list(TASKS).index(task))
    ids = make_batch(recipe, vocabulary, 1, generator).ids[0].tolist()
    return Prompt(ids[:-ANSWER], ids[-ANSWER:])


def make_batch(recipe: Recipe, vocabulary: Vocabulary, rows: int, generator: torch.Generator) -> Batch:
    """Draw rows of a recipe, on the generator's device.

    Raises:
        ValueError: The statements and questions do not fit into the rows, or the vocabulary is too small for them.
    """
    fill: dict[str, Callable[..., Batch]] = {
        "recall": _recall,
        "variables": _chains,
        "hops": _chains,
        "frequent": _frequent,
    }
    ids = sentences(vocabulary.filler, rows, recipe.length, generator) + vocabulary.first("filler")
    ids[:, 0] = Marker.BEGIN
    return fill[recipe.task](recipe, vocabulary, ids, generator)


def _recall(recipe: Recipe, vocabulary: Vocabulary, ids: Tensor, generator: torch.Generator) -> Batch:
    """FACT k k v v v … ASK k k → v v v. Keys are cells of a grid, so that each shares either half with others."""
    rows, facts, questions = len(ids), max(2, int(recipe.share * recipe.length / 6)), recipe.questions
    side = min(vocabulary.keys // 2, int(2 * facts**0.5) + 1)
    if facts > side * side:
        raise bad_argument("vocabulary", f"at least {2 * int(facts**0.5 + 1)} keys", vocabulary.keys, "use shorter rows")
    halves = distinct(rows, vocabulary.keys, 2 * side, generator) + vocabulary.first("keys")
    cells = distinct(rows, side * side, facts, generator)
    keys = torch.stack([halves.gather(1, cells // side), halves.gather(1, side + cells % side)], -1)
    statements = torch.cat([keys, _values(vocabulary, rows, facts, generator)], -1)

    times = uniform((rows, facts), generator)
    asked = integers(facts, (rows, questions), generator)
    places = torch.cat([times, later(times.gather(1, asked), generator)], 1)
    starts = place(places, torch.full_like(places[0], 6, dtype=torch.long), ids, generator)
    write(ids, starts[:, :facts], _marked(Marker.FACT, statements))
    write(ids, starts[:, facts:], _marked(Marker.ASK, _rows_of(statements, asked)))
    return Batch(ids, starts[:, facts:] + 3, torch.zeros_like(asked))


def _chains(recipe: Recipe, vocabulary: Vocabulary, ids: Tensor, generator: torch.Generator) -> Batch:
    """SET x v v v … SET y x … VALUE y → v v v; hops say EDGE and GOAL, and their statements stand in any order."""
    rows, links, questions = len(ids), recipe.links, recipe.questions
    ordered = recipe.task == "variables"
    states, asks = (Marker.SET, Marker.VALUE) if ordered else (Marker.EDGE, Marker.GOAL)
    chains = max(2, min(int(recipe.share * recipe.length / (5 + 3 * links)), vocabulary.names // (links + 1)))
    nodes = chains * (links + 1)
    if nodes > vocabulary.names:
        raise bad_argument("vocabulary", f"at least {nodes} names", vocabulary.names, "follow fewer links")
    names = distinct(rows, vocabulary.names, nodes, generator) + vocabulary.first("names")  # a chain's are `chains` apart
    values = _values(vocabulary, rows, chains, generator)
    times = uniform((rows, links + 1, chains), generator)
    times = times.sort(1).values if ordered else times
    known = times.cummax(1).values.flatten(1)

    chain, depth = integers(chains, (rows, questions), generator), integers(links + 1, (rows, questions), generator)
    depth[:, -1] = links
    node = depth * chains + chain
    worked = (
        chains + torch.randperm(nodes - chains, generator=generator, device=ids.device)[: int(recipe.worked * (nodes - chains))]
    )
    widths = torch.tensor([5] * chains + [3] * (nodes - chains) + [5] * questions, device=ids.device)
    widths[worked] += ANSWER
    starts = place(torch.cat([times.flatten(1), later(known.gather(1, node), generator)], 1), widths, ids, generator)

    write(ids, starts[:, :chains], _marked(states, torch.cat([names[:, :chains, None], values], -1)))
    write(ids, starts[:, chains:nodes], _marked(states, torch.stack([names[:, chains:], names[:, :-chains]], -1)))
    write(ids, starts[:, worked] + 3, values[:, worked % chains])
    write(ids, starts[:, nodes:], _marked(asks, torch.cat([names.gather(1, node)[..., None], _rows_of(values, chain)], -1)))
    told = known[:, worked - chains] < times.flatten(1)[:, worked]
    answers = torch.cat([(starts[:, worked] + 3).masked_fill(~told, -1), starts[:, nodes:] + 2], 1)
    return Batch(ids, answers, torch.cat([(worked // chains - 1).expand(rows, -1), depth], 1))


def _frequent(recipe: Recipe, vocabulary: Vocabulary, ids: Tensor, generator: torch.Generator) -> Batch:
    """Words w w w … TOP → the three most frequent so far, most frequent first; a tie among the first four is no question."""
    rows, slots, questions, device = len(ids), int(recipe.share * recipe.length), recipe.questions, ids.device
    counts = _skewed_counts(slots, min(_RANKS, vocabulary.words))
    words = distinct(rows, vocabulary.words, len(counts), generator) + vocabulary.first("words")
    ranks = torch.arange(len(counts), device=device).repeat_interleave(torch.tensor(counts, device=device)).expand(rows, -1)

    times = uniform((rows, slots), generator)
    asked = later(uniform((rows, questions), generator), generator)
    widths = torch.tensor([1] * slots + [1 + ANSWER] * questions, device=device)
    starts = place(torch.cat([times, asked], 1), widths, ids, generator)
    write(ids, starts[:, :slots], words.gather(1, ranks)[..., None])
    answers = starts[:, slots:] + 1
    for question in range(questions):
        seen = (times < asked[:, question, None]).long()
        top = torch.zeros(rows, len(counts), dtype=torch.long, device=device).scatter_add(1, ranks, seen).topk(ANSWER + 1)
        write(ids, starts[:, slots + question, None], _marked(Marker.TOP, words.gather(1, top.indices[:, :ANSWER])[:, None]))
        tied = (top.values.diff(dim=1) == 0).any(1)
        answers[:, question] = answers[:, question].masked_fill(tied, -1)
    return Batch(ids, answers, torch.zeros_like(answers))


def _skewed_counts(total: int, ranks: int) -> list[int]:
    """Counts that fall with rank like a power and sum up to ``total``; the first four differ."""
    ranks = min(ranks, total // 4)
    weights = [rank**-_SKEW for rank in range(1, ranks + 1)]
    counts = [max(1, int(total * weight / sum(weights))) for weight in weights]
    counts[0] += total - sum(counts)
    if ranks <= ANSWER or any(more <= fewer for more, fewer in pairwise(counts[: ANSWER + 1])):
        raise bad_argument("length", "room for about 20 words", f"{total} words", "use longer rows")
    return counts


def _values(vocabulary: Vocabulary, rows: int, count: int, generator: torch.Generator) -> Tensor:
    """Answers ``(rows, count, ANSWER)``, whose first tokens differ for as long as there are enough."""
    rest = integers(vocabulary.values, (rows, count, ANSWER - 1), generator)
    laps = [distinct(rows, vocabulary.values, min(vocabulary.values, count - lap), generator)
            for lap in range(0, count, vocabulary.values)]  # fmt: skip
    return torch.cat([torch.cat(laps, 1)[..., None], rest], -1) + vocabulary.first("values")


def _marked(marker: Marker, items: Tensor) -> Tensor:
    return torch.nn.functional.pad(items, (1, 0), value=int(marker))


def _rows_of(items: Tensor, index: Tensor) -> Tensor:
    return items.gather(1, index[..., None].expand(-1, -1, items.shape[-1]))
