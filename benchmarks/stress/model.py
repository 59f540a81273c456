"""The stress model and what it is trained on: its shape, recipes of training rows, and the logits of their answers."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from stress.tasks import ANSWER, Batch, Recipe, Vocabulary
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

SPAN = 131072
"""Positions that training covers: rows are stretched to it by jumps, so that longer prompts hold no new distance."""

MOST_LINKS = {"variables": 3, "hops": 2}


@dataclass(frozen=True)
class Size:
    """Shape of a model, and its vocabulary."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    vocabulary: Vocabulary


SIZES = {
    "full": Size(8, 512, 8, 2, Vocabulary()),
    "tiny": Size(6, 64, 2, 1, Vocabulary(keys=64, names=64, values=64, words=32, filler=64)),
}


def build(size: Size) -> LlamaForCausalLM:
    """A model with random weights. θ is so large that a third of a head's dimensions tell no distance, only content."""
    config = LlamaConfig(
        vocab_size=size.vocabulary.size,
        hidden_size=size.hidden,
        intermediate_size=2 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=SPAN,
        rope_parameters={"rope_type": "default", "rope_theta": 1e8},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def draw_recipe(task: str, length: int, chance: random.Random) -> Recipe:
    """A training recipe: statements sparse or dense, questions many."""
    if task == "frequent":
        return Recipe(task, length, chance.uniform(0.35, 0.6), questions=4)
    share = math.exp(chance.uniform(math.log(1 / 32), math.log(0.4)))
    questions = max(2, int(chance.uniform(0.1, 0.4) * length / 6))
    most = MOST_LINKS.get(task, 0)
    return Recipe(task, length, share, questions, chance.randint(min(1, most), most), worked=chance.choice([0.0, 0.3, 0.6]))


def draw_repeats(vocabulary: Vocabulary, rows: int, length: int, generator: torch.Generator) -> Batch:
    """Rows that repeat a random text of some length over and over, every token to be told from the last time on.

    Whoever can do that can look things up. Without it a model learns to answer with any value of the row, and stays with
    that for long: a small one on a CPU had found a quarter of the facts after 1350 steps, with it 85 % after 750.
    """
    texts = torch.randint(
        vocabulary.MARKERS, vocabulary.first("filler"), (rows, length), generator=generator, device=generator.device
    )
    period = torch.randint(length // 8, length // 2, (rows, 1), generator=generator, device=generator.device)
    place = torch.arange(length, device=generator.device)
    starts = place[1 : length - ANSWER + 1 : ANSWER].expand(rows, -1)
    return Batch(texts.gather(1, place % period), starts.masked_fill(starts <= period, -1), torch.zeros_like(starts))


def stretched(rows: int, length: int, generator: torch.Generator) -> Tensor:
    """Positions of rows; every other row jumps ahead three times, to end anywhere up to SPAN."""
    device = generator.device
    jumps = torch.rand(rows, 3, generator=generator, device=device) * max(0, SPAN - length) / 3
    jumps[::2] = 0
    at = torch.randint(1, length, (rows, 3), generator=generator, device=device)
    ahead = torch.zeros(rows, length, device=device).scatter_add_(1, at, jumps.floor()).cumsum(1)
    return torch.arange(length, device=device) + ahead.long()


@dataclass(frozen=True)
class Questions:
    """The batches of all tasks as one.

    Attributes:
        ids: ``(rows, length)``.
        starts: Where answers begin in the flattened ids.
        weights: Of every answer in the loss, so that each task counts the same.
        groups: Index into ``names`` of every answer.
        names: ``length/task/links``.
    """

    ids: Tensor
    starts: Tensor
    weights: Tensor
    groups: Tensor
    names: list[str]


def join(batches: dict[str, Batch]) -> Questions:
    """Put the batches of some tasks together; all rows have the same length."""
    ids = torch.cat([batch.ids for batch in batches.values()])
    starts, weights, groups, names, row = [], [], [], list[str](), 0
    for task, batch in batches.items():
        rows = torch.arange(row, row + len(batch.ids), device=ids.device)[:, None]
        asked = batch.answers >= 0
        starts.append((batch.answers + rows * ids.shape[1])[asked])
        weights.append(torch.full(starts[-1].shape, 1 / max(1, len(starts[-1]) * len(batches)), device=ids.device))
        groups.append(batch.depth[asked] + len(names))
        names += [f"{ids.shape[1]}/{task}/{links}" for links in range(MOST_LINKS.get(task, 0) + 1)]
        row += len(batch.ids)
    return Questions(ids, torch.cat(starts), torch.cat(weights), torch.cat(groups), names)


def answer_logits(
    model: LlamaForCausalLM, ids: Tensor, starts: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits ``(n, ANSWER, vocabulary)`` of the answers that begin at flat places ``starts`` of ``ids``, and the answers."""
    # A mask of ones says that a row is one text; transformers would take a jump in the positions for the start of another.
    output = model.model(ids, attention_mask=torch.ones_like(ids), position_ids=positions, use_cache=False)
    where = starts[:, None] + torch.arange(ANSWER, device=ids.device)
    return model.lm_head(output.last_hidden_state.flatten(0, 1)[where - 1]).float(), ids.flatten()[where]
