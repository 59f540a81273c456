"""Shares for every head of a model: where keep by mass should spend, learnt from the model's own gradients.

Prompts of two kinds are read dense and backwards: windows of texts, of which every token counts, and prompts that hide
numbers, whose answers count. What the loss of these tokens would rise by, to second order, is estimated for every head at
every share (:mod:`.head_curves`); then shares are chosen whose density is the one asked for and whose summed loss is least.
Weights of the model stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stem_attention.config import StemConfig
from stem_attention.errors import bad_argument
from stem_attention.evaluation.head_curves import SHARES, feeling, head_curves
from stem_attention.evaluation.layers import check_full_attention
from stem_attention.evaluation.perplexity import read_text, score_text
from stem_attention.evaluation.prefill import read
from stem_attention.evaluation.prompts import planted_prompt
from stem_attention.evaluation.texts import Text, tokenized
from stem_attention.policies.budget import block_count
from stem_attention.policies.mass import always_kept

NEEDLE_WEIGHT = 1.0
"""How many tokens of a text a token of an answer is worth."""

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
    """What heads lose and keep at :data:`..head_curves.SHARES`; fp64 ``(layers, heads, shares)``.

    Attributes:
        slope: What the loss of a token rises by to first order, in nats, averaged over the tokens that count.
        bend: Its second order: half the Fisher information in the direction that the head's result moves in.
        density: Kept share of the causal block pairs, averaged over the prompts.
    """

    slope: Tensor
    bend: Tensor
    density: Tensor

    @property
    def cost(self) -> Tensor:
        """Both orders. Nothing is gained by dropping blocks: where the slope says so, that is chance."""
        return self.slope.clamp(min=0) + self.bend


def text_lessons(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], tokens: int, count: int) -> list[Lesson]:
    """``count`` windows of each text, spread through it.

    Raises:
        ValueError: A text is too short, or two share a name.
    """
    sources = tokenized(tokenizer, texts).values()
    return [Lesson(text.window(start, tokens), []) for text in sources for start in text.starts(tokens, count)]


def other_windows(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], tokens: int, count: int) -> list[Lesson]:
    """Windows of each text between the ``count`` of :func:`text_lessons`, to see whether what was learnt holds there.

    Raises:
        ValueError: A text is too short for them beside the others, or two share a name.
    """
    sources = tokenized(tokenizer, texts).values()
    all_of = max(3, 2 * count - 1)
    return [Lesson(text.window(start, tokens), []) for text in sources for start in text.starts(tokens, all_of)[1::2]]


def needle_lessons(
    tokenizer: PreTrainedTokenizerBase, haystack: str | None, tokens: int, count: int, seed: int
) -> list[Lesson]:
    """``count`` prompts that hide four numbers and ask for one, at depths from the start to the end of the text.

    Raises:
        ValueError: ``tokens`` is too few for the question.
    """
    lessons = []
    for i in range(count):
        prompt = planted_prompt(
            tokenizer, tokens - _ANSWER_ROOM, seed=f"calibrate {seed} {i}", depth=(i + 0.5) / count, kind="multikey",
            count=_COMPETING, haystack=haystack,
        )  # fmt: skip
        lessons.append(Lesson(prompt.ids, list(tokenizer(f" {prompt.answers[0]}", add_special_tokens=False).input_ids)))
    return lessons


def check_density(density: float, lessons: Sequence[Lesson], config: StemConfig) -> None:
    """Check what can be known before anything is learnt.

    Raises:
        ValueError: Forced blocks alone keep more of these prompts.
    """
    forced = [_forced_density(len(lesson.ids) + len(lesson.answer), config) for lesson in lessons]
    _check_reachable(density, min(forced))


def _forced_density(tokens: int, config: StemConfig) -> float:
    blocks = torch.arange(block_count(tokens, config.block_size))
    forced = always_kept(config, blocks[:, None], blocks, len(blocks)).tril()
    return float(forced.sum() / torch.ones_like(forced).tril().sum())


def _check_reachable(density: float, least: float) -> None:
    if not least < density < 1:
        raise bad_argument("density", f"a number between {least:.3f} and 1", density, "forced blocks alone keep the former")


def learn(model: PreTrainedModel, lessons: Sequence[Lesson], config: StemConfig, seed: int, tick: Callable[[], None]) -> Curves:
    """Read the lessons backwards, one after the other; ``tick`` is called after each.

    Raises:
        UnsupportedError: Some layers of the model attend to something else than all earlier tokens.
    """
    check_full_attention(model, "calibrate")
    text = model.config.get_text_config()
    sums = torch.zeros(3, text.num_hidden_layers, text.num_attention_heads, len(SHARES), dtype=torch.float64)
    sums[2, : config.dense_layers] = 2 * len(lessons)
    pass_of = _FIRST_ORDER

    def told(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, gradient: Tensor) -> None:
        if layer < config.dense_layers:
            return
        queries, keys, values = (x[0].transpose(0, 1) for x in (q, k, v))
        found = head_curves(queries, keys, values, gradient[0], config, scale)
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


def _losses(model: PreTrainedModel, lesson: Lesson, generator: torch.Generator, *, drawn: bool) -> Tensor:
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
    """Shares ``(layers, heads)`` that keep ``density`` and lose least of the weighted costs.

    Raises:
        ValueError: Not even the largest shares keep so little.
    """
    kept = torch.stack([part.density for part, _ in curves]).mean(0)
    _check_reachable(density, float(kept[..., -1].mean()))
    cost = torch.stack([weight * part.cost for part, weight in curves]).sum(0)
    low, high = 1e-12, 1e12  # price of a block: the higher, the fewer are bought
    for _ in range(100):
        price = (low * high) ** 0.5
        bought = kept.gather(-1, _choices(cost, kept, price)).mean()
        low, high = (price, high) if float(bought) > density else (low, price)
    return torch.tensor(SHARES, dtype=torch.float64)[_choices(cost, kept, high)[..., 0]]


def _choices(cost: Tensor, kept: Tensor, price: float) -> Tensor:
    """Each head's share, as an index, at a price of blocks; ``(layers, heads, 1)``."""
    return (cost + price * kept).argmin(-1, keepdim=True)


def tuned(
    model: PreTrainedModel, lessons: Sequence[Lesson], config: StemConfig, density: float, tick: Callable[[], None]
) -> tuple[StemConfig, float]:
    """The config with the ``share`` at which sparse prefills of the prompts keep ``density``; and what they keep.

    A prefill that is sparse itself keeps other blocks than what is seen on a dense one's activations.
    """
    share, tries = config.share, list[tuple[float, float]]()
    for _ in range(_TRIES):
        tried = replace(config, share=share, dense_below=0)
        kept = sum(read(model, lesson.ids, tried, positions=1).density for lesson in lessons) / len(lessons)
        tries.append((share, kept))
        tick()
        if _distance(kept, density) < _NEAR:
            break
        share = _next_share(tries, density)
    share, kept = min(tries, key=lambda found: _distance(found[1], density))
    return replace(config, share=share), kept


def _distance(kept: float, density: float) -> float:
    return abs(kept / density - 1)


def _next_share(tries: Sequence[tuple[float, float]], density: float) -> float:
    """What to try after these shares and the densities they kept: between the two around the one asked for, if there are."""
    above = max((found for found in tries if found[1] > density), default=None)
    below = min((found for found in tries if found[1] < density), default=None)
    if above is None or below is None:
        share, kept = tries[-1]
        return share * (kept / density) ** 2  # about what densities do
    way = math.log(above[1] / density) / math.log(above[1] / below[1])
    return above[0] * math.pow(below[0] / above[0], way)


def text_losses(model: PreTrainedModel, lessons: Sequence[Lesson], configs: Sequence[StemConfig]) -> list[float]:
    """What the loss of a token of these windows rises by under each config, in nats; dense they are read once for all."""
    rises: list[list[float]] = [[] for _ in configs]
    for lesson in lessons:
        dense = read_text(model, lesson.ids, None)
        for config, found in zip(configs, rises, strict=True):
            scores = score_text(model, lesson.ids, dense, read_text(model, lesson.ids, replace(config, dense_below=0)))
            found.append(float((scores.loss - scores.dense_loss).mean()))
    return [fmean(found) for found in rises]
