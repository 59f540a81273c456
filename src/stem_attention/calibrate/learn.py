"""Shares for every head of a model: where keep by mass should spend, learnt from the model's own gradients.

Prompts of two kinds are read dense and backwards: windows of texts, of which every token counts, and prompts that hide
numbers, whose answers count. What the loss of these tokens would rise by, to second order, is estimated for every head at
every share (:mod:`.curves`); then shares are chosen whose density is the one asked for and whose summed loss is least.
Weights of the model stay as they are.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor

from stem_attention.blocks import block_count
from stem_attention.calibrate.curves import SHARES, feeling, head_curves
from stem_attention.errors import UnsupportedError, bad_argument
from stem_attention.models.load import Model, Tokenizer, check_full_attention
from stem_attention.models.prefill import attending, read
from stem_attention.models.prompts import planted_prompt
from stem_attention.models.texts import Text, tokenized
from stem_attention.policies import Mass

NEEDLE_WEIGHT = 1.0  # how many tokens of a text a token of an answer is worth
_PREDICTED = 8192  # tokens of a text whose predictions are looked at: their logits are held at once
_COMPETING = 4  # numbers that a prompt hides, of which one is asked for
_ANSWER_ROOM = 24  # tokens that an answer may have
_FIRST_ORDER, _SECOND_ORDER = 0, 1  # what a pass backwards is for; the place of its sums
_TRIES = 8  # prefills of each prompt by which the last word on density is found
_NEAR = 0.01  # relative distance from the density asked for at which that search ends


@dataclass(frozen=True)
class Lesson:
    """A prompt to learn from; ``answer`` is empty where the text itself is what is predicted."""

    ids: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Curves:
    """Losses and densities of heads at :data:`.curves.SHARES`; fp64 ``(layers, heads, shares)``."""

    slope: Tensor  # what the loss of a token rises by to first order, in nats, averaged over the tokens that count
    bend: Tensor  # its second order: half the Fisher information in the direction that the head's result moves in
    density: Tensor  # kept share of the causal block pairs, averaged over the prompts

    @property
    def cost(self) -> Tensor:
        """Sum of both orders. Nothing is gained by dropping blocks: where the slope says so, that is chance."""
        return self.slope.clamp(min=0) + self.bend


def text_lessons(tokenizer: Tokenizer, texts: Sequence[Text], tokens: int, count: int) -> list[Lesson]:
    """Cut ``count`` windows from each text, spread through it. ValueError where one is too short, or two share a name."""
    sources = tokenized(tokenizer, texts).values()
    return [Lesson(text.window(start, tokens), []) for text in sources for start in text.starts(tokens, count)]


def other_windows(tokenizer: Tokenizer, texts: Sequence[Text], tokens: int, count: int) -> list[Lesson]:
    """Cut windows from each text between those of :func:`text_lessons`, to see whether what was learnt holds there."""
    sources, both = tokenized(tokenizer, texts).values(), max(3, 2 * count - 1)
    return [Lesson(text.window(start, tokens), []) for text in sources for start in text.starts(tokens, both)[1::2]]


def needle_lessons(tokenizer: Tokenizer, haystack: str | None, tokens: int, count: int, seed: str) -> list[Lesson]:
    """Make ``count`` prompts that hide four numbers and ask for one, at depths from the start to the end of the text."""
    lessons = []
    for i in range(count):
        prompt = planted_prompt(
            tokenizer, tokens, seed=f"{seed} {i}", depth=(i + 0.5) / count, kind="multikey", count=_COMPETING,
            haystack=haystack, answer=_ANSWER_ROOM,
        )  # fmt: skip
        lessons.append(Lesson(prompt.ids, list(tokenizer(f" {prompt.answers[0]}", add_special_tokens=False).input_ids)))
    return lessons


def check_density(density: float, lessons: Sequence[Lesson], policy: Mass) -> None:
    """Raise a ValueError, before anything is learnt, where the blocks that are always kept are more than ``density``."""

    def forced(tokens: int) -> float:
        blocks = torch.arange(block_count(tokens, policy.block_size))
        kept = policy.always_kept(blocks[:, None], blocks, len(blocks)).tril()
        return float(kept.sum() / torch.ones_like(kept).tril().sum())

    lengths = [len(lesson.ids) + len(lesson.answer) for lesson in lessons]
    least, tokens = min((forced(length), length) for length in lengths)
    fix = f"blocks that are always kept are {least:.3f} of {tokens} tokens: ask for more, or for longer prompts"
    _check_reachable(density, least, fix)


def _check_reachable(density: float, least: float, fix: str) -> None:
    if not least < density < 1:
        raise bad_argument("density", f"a number between {least:.3f} and 1", density, fix)


def learn(model: Model, lessons: Sequence[Lesson], policy: Mass, seed: int, tick: Callable[[], None]) -> Curves:
    """Read the lessons backwards, one after the other; ``tick`` is called after each. Takes models of full attention alone."""
    check_full_attention(model, "calibrate", max(len(lesson.ids) + len(lesson.answer) for lesson in lessons))
    _check_plain_scores(model)
    _density(model, lessons[0], replace(policy, head_factors=None))  # to be refused now where it would be after hours
    text = model.config.get_text_config()
    sums = torch.zeros(3, text.num_hidden_layers, text.num_attention_heads, len(SHARES), dtype=torch.float64)
    pass_of = _FIRST_ORDER

    def told(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, gradient: Tensor) -> None:
        queries, keys, values = (x[0].transpose(0, 1) for x in (q, k, v))
        found = head_curves(queries, keys, values, gradient[0], policy, scale)
        sums[pass_of, layer] += found[pass_of].cpu()
        sums[2, layer] += found[2].cpu()

    generator, counted = torch.Generator().manual_seed(seed), 0
    with feeling(model, told):
        for lesson in lessons:
            for pass_of in (_FIRST_ORDER, _SECOND_ORDER):
                losses = _losses(model, lesson, generator, drawn=pass_of == _SECOND_ORDER)
                torch.autograd.backward(losses.sum())
            counted += len(losses)
            tick()
    return Curves(sums[0] / counted, sums[1] / counted / 2, sums[2] / len(lessons) / 2)


def _check_plain_scores(model: Model) -> None:
    """Refuse models whose scores the estimates do not know."""
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    if capped or any(name.endswith("sinks") for name, _ in model.named_parameters()):
        form = "soft-capped scores" if capped else "attention sinks"
        raise UnsupportedError(f"calibrate does not know {form}; run this model with Mass() as it is")


def _losses(model: Model, lesson: Lesson, generator: torch.Generator, *, drawn: bool) -> Tensor:
    """Negative log-probabilities of the tokens that count: of those that are there, or of ``drawn`` ones with random signs.

    The square of the gradient of a sum with random signs is, on average, the sum of the squares of the tokens' own gradients:
    one pass backwards instead of thousands. Tokens of a text are drawn from what the model predicts, which makes that sum the
    Fisher information: twice what a small change costs in divergence. Those of an answer, which leave no doubt, are its own.
    """
    ids, answer = torch.tensor([lesson.ids + lesson.answer], device=model.device), lesson.answer
    last = ids.shape[1] - 1
    if answer:
        positions = torch.arange(last - len(answer), last)
    else:
        positions = torch.randperm(last, generator=generator)[: min(_PREDICTED, last)].sort().values
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False, logits_to_keep=positions.to(ids.device)).logits[0].float()
    tokens = ids[0, (positions + 1).to(ids.device)]
    if drawn and not answer:
        draws = torch.rand(len(positions), 1, generator=generator).to(ids.device)
        tokens = (logits.detach().softmax(-1).cumsum(-1) < draws).sum(-1).clamp(max=logits.shape[1] - 1)
    losses = torch.nn.functional.cross_entropy(logits, tokens, reduction="none")
    if drawn:
        losses = losses * (torch.randint(0, 2, (len(positions),), generator=generator) * 2 - 1).to(ids.device)
    return losses


def allocate(curves: Sequence[tuple[Curves, float]], density: float) -> Tensor:
    """Find the shares ``(layers, heads)`` that keep ``density`` (or raise a ValueError) and lose least of the weighted cost."""
    kept = torch.stack([part.density for part, _ in curves]).mean(0)
    _check_reachable(density, float(kept[..., -1].mean()), "the largest shares keep the former: ask for more")
    cost = torch.stack([weight * part.cost for part, weight in curves]).sum(0)

    def choices(price: float) -> Tensor:  # each head's share, as an index, (layers, heads, 1)
        return (cost + price * kept).argmin(-1, keepdim=True)

    low, high = 1e-12, 1e12  # price of a block: the higher, the fewer are bought
    for _ in range(100):
        price = (low * high) ** 0.5
        bought = kept.gather(-1, choices(price)).mean()
        low, high = (price, high) if float(bought) > density else (low, price)
    return torch.tensor(SHARES, dtype=torch.float64)[choices(high)[..., 0]]


def _density(model: Model, lesson: Lesson, policy: Mass) -> float:
    """Read a prompt sparsely and return what is kept of it; an UnsupportedError where a layer runs dense, as none is to."""
    reading = read(model, lesson.ids, policy, dense_below=0, dense_layers=0, positions=1)
    if reading.dense_reasons:
        ran = f"{type(model).__name__} runs some dense ({reading.dense_reasons})"
        raise UnsupportedError(f"calibrate takes models whose layers all run sparse; {ran}")
    return reading.density


def tuned(
    model: Model, lessons: Sequence[Lesson], policy: Mass, density: float, tick: Callable[[], None]
) -> tuple[Mass, float]:
    """Find the ``share`` at which sparse prefills of the prompts keep ``density``: the policy with it, and what they keep.

    A prefill that is sparse itself keeps other blocks than what is seen on a dense one's activations.
    """
    share, tries = policy.share, list[tuple[float, float]]()
    for _ in range(_TRIES):
        tried = replace(policy, share=share)
        kept = fmean(_density(model, lesson, tried) for lesson in lessons)
        tries.append((share, kept))
        tick()
        if abs(kept / density - 1) < _NEAR:
            break
        above = max((found for found in tries if found[1] > density), default=None)
        below = min((found for found in tries if found[1] < density), default=None)
        if above and below:  # between the two tries around the density asked for
            way = math.log(above[1] / density) / math.log(above[1] / below[1])
            share = above[0] * math.pow(below[0] / above[0], way)
        else:
            share *= (kept / density) ** 2  # about what densities do
    share, kept = min(tries, key=lambda found: abs(found[1] / density - 1))
    return replace(policy, share=share), kept


@torch.no_grad()
def loss_rises(model: Model, lessons: Sequence[Lesson], policies: Sequence[Mass]) -> list[float]:
    """Measure what the loss of a token that counts rises by under each policy, in nats; dense the prompts are read once."""

    def loss(lesson: Lesson, policy: Mass | None) -> float:
        with attending(model, policy, dense_below=0, dense_layers=0):
            return float(_losses(model, lesson, torch.Generator().manual_seed(0), drawn=False).mean())

    rises = []
    for lesson in lessons:
        dense = loss(lesson, None)
        rises.append([loss(lesson, policy) - dense for policy in policies])
    return [fmean(column) for column in zip(*rises, strict=True)]
