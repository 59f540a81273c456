"""Policies that rank blocks: a score says how good a block is, a schedule how many of the best a row keeps.

The schedule is the paper's Token Position-Decay (section 4). It is plain integers on the host: it depends on the prompt's
length alone, so it costs no device work and is the same for every head, chunk and backend.
"""

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor
from typing_extensions import Self

from stem_attention.blocks import BlockGrid, block_count
from stem_attention.errors import bad_argument
from stem_attention.policies.base import Policy, check_choice, check_integers, check_number, softcap_for
from stem_attention.selection import PAD, BlockSelection

# Constants of the public code's schedule, in blocks: prompts shorter than the first keep everything, longer ones
# get the second on top of their ratio.
_ANGELSLIM_KEEP_ALL_BELOW = 56
_ANGELSLIM_EXTRA_BLOCKS = 30

# Products such as 0.1 * 1280 land a hair above the integer they mean; ceil must not round that hair up.
_HAIR = 1e-9

# Choosing costs a dozen small steps whatever the rows, so scores that come row by row are chosen from in runs of these.
_RUN = 32


@dataclass(frozen=True)
class Ranked(Policy):
    """Keep the best blocks of every row, as many as the schedule allows; subclasses say how good a block is.

    Attributes:
        block_size: Tokens per block (``B``).
        decay: ``mu``, the share of the first row's budget that is left for the last row. 1 is uniform top-k.
        schedule: First row's budget against prompt length. ``"smooth"``: the two ratios joined without a jump.
            ``"step"``: the paper's jump at the knee. ``"angelslim"``: the public code's flat-then-falling schedule.
        ratio_short: Share of the blocks kept by the first rows of prompts up to ``knee_tokens``.
        ratio_long: The same for prompts far beyond the knee. At most ``ratio_short``.
        knee_tokens: Prompt length, in tokens, at which the ratio starts to fall.
        min_blocks: Smallest first-row budget in blocks. ``None`` means ``sink_blocks + local_blocks``.
        sink_blocks: Blocks at the start of the prompt that every row keeps.
        local_blocks: Blocks up to and including the diagonal that every row keeps. At least 1.
        tail_blocks: Last query blocks of the whole prompt, where the question usually stands, that keep everything.
        forced: ``"inside"``: sink and local blocks count against the budget. ``"extra"``: they are added to the top-k.
    """

    block_size: int = 128
    decay: float = 0.7
    schedule: str = "smooth"
    ratio_short: float = 0.2
    ratio_long: float = 0.1
    knee_tokens: int = 16384
    min_blocks: int | None = None
    sink_blocks: int = 1
    local_blocks: int = 2
    tail_blocks: int = 2
    forced: str = "inside"

    def check(self) -> None:
        check_integers(self, knee_tokens=1, sink_blocks=0, local_blocks=1, tail_blocks=0)
        if self.min_blocks is not None:
            check_integers(self, min_blocks=1)
        for name in ("decay", "ratio_short", "ratio_long"):
            check_number(self, name, 0.0, 1.0, above=True)
        check_choice(self, "schedule", ("smooth", "step", "angelslim"))
        check_choice(self, "forced", ("inside", "extra"))
        if self.ratio_long > self.ratio_short:
            fix = "long prompts keep a smaller share than short ones; raise ratio_short too"
            raise bad_argument("ratio_long", f"at most ratio_short={self.ratio_short}", self.ratio_long, fix)

    @abstractmethod
    def scores(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Iterator[tuple[int, Tensor]]:
        """Score the query blocks of a call, which has at least one query, in order; ``q``, ``k``, ``v`` as in a policy's call.

        Yields:
            The first of a run of query blocks, and ``(batch, q_heads, rows, columns)``: higher is better. ``columns`` are the
            causal key blocks of the run's last row; what a row holds after its diagonal does not count.

        Scores that follow from those of attention take one more argument, ``softcap: float | None = None``: see the call.
        """

    def resized(self, size: int, blocks: int, density: float) -> Self:
        return replace(self, ratio_short=size / blocks, ratio_long=size / blocks)

    def row_counts(self, num_blocks: int) -> tuple[int, ...] | None:
        return self.row_limits(num_blocks) if self.forced == "inside" else None

    def row_limits(self, num_blocks: int) -> tuple[int, ...]:
        """``n(I)`` for every row; with ``forced="extra"`` forced blocks may be among the top-k, and a row keeps fewer."""
        ranked = self.ranked_counts(num_blocks)
        if self.forced == "inside":
            return ranked
        forced = self.sink_blocks + self.local_blocks
        limits = (min(row + 1, count + forced) for row, count in enumerate(ranked))
        return self.once(("limits", num_blocks), lambda: tuple(limits))

    def ranked_counts(self, num_blocks: int) -> tuple[int, ...]:
        """Count what the choice by score is asked for in every row; ``row + 1`` or more is everything.

        With ``forced="inside"`` that is all a row keeps, with ``"extra"`` the top-k to which forced blocks are then added.
        """

        def count(row: int) -> int:
            if row >= num_blocks - self.tail_blocks:
                return row + 1
            wanted = self.scored_budget(num_blocks, row)
            return wanted if self.forced == "extra" else min(row + 1, max(wanted, self.sink_blocks + self.local_blocks))

        return self.once(("ranked", num_blocks), lambda: tuple(map(count, range(num_blocks))))

    def first_row_budget(self, num_blocks: int) -> int:
        """``k_start``: blocks the first query blocks of a prompt of ``num_blocks`` blocks may keep."""
        knee_blocks = self.knee_tokens / self.block_size
        short, long = self.ratio_short * num_blocks, self.ratio_long * num_blocks
        if self.schedule == "smooth":
            wanted = math.ceil(min(short, max(long, self.ratio_short * knee_blocks)) - _HAIR)
        elif self.schedule == "step":
            wanted = math.ceil((short if num_blocks <= math.ceil(knee_blocks) else long) - _HAIR)
        elif num_blocks < _ANGELSLIM_KEEP_ALL_BELOW:
            wanted = num_blocks
        else:
            wanted = int(short if num_blocks < knee_blocks else long) + _ANGELSLIM_EXTRA_BLOCKS
        floor = self.sink_blocks + self.local_blocks if self.min_blocks is None else self.min_blocks
        return min(max(wanted, floor), num_blocks)

    def scored_budget(self, num_blocks: int, row: int) -> int:
        """``k(I)``: the decayed budget of query block ``row``, before forced blocks and the causal limit."""
        k_start = self.first_row_budget(num_blocks)
        if self.schedule != "angelslim":
            return math.ceil(k_start - k_start * (1 - self.decay) * row / num_blocks - _HAIR)
        falling = num_blocks - k_start
        if row < k_start or falling <= 1:
            return k_start
        end = k_start * self.decay
        return max(1, math.floor(k_start + (end - k_start) * (row - k_start) / (falling - 1) + _HAIR))

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, prompt_len: int | None = None,
        softcap: float | None = None,
    ) -> BlockSelection:  # fmt: skip
        grid = BlockGrid.of(q, k, self.block_size)
        num_blocks = block_count(grid.kv_len if prompt_len is None else prompt_len, self.block_size)
        limits = self.row_limits(num_blocks)[grid.first_row : grid.end_row]
        shape = (q.shape[0], q.shape[2], grid.rows, max(limits, default=0))
        indices = torch.full(shape, PAD, dtype=torch.int32, device=q.device)
        scale, told = q.shape[3] ** -0.5 if scale is None else scale, softcap_for(type(self).scores, softcap)
        for row, scores in self.scores(q, k, v, scale, **told) if grid.rows else ():
            first, stop, inside = row - grid.first_row, row + scores.shape[2], self.forced == "inside"
            budgets = self.ranked_counts(num_blocks)[row:stop]
            ids = choose(scores, row, budgets, self.sink_blocks, self.local_blocks, inside=inside)[..., : shape[3]]
            indices[:, :, first : stop - grid.first_row, : ids.shape[3]] = ids
        counts = (indices != PAD).sum(-1, dtype=torch.int32)
        return BlockSelection(indices, counts, self.block_size, grid.q_len, grid.kv_len)


def choose(scores: Tensor, first_row: int, budgets: Sequence[int], sink: int, local: int, *, inside: bool = True) -> Tensor:
    """Keep forced blocks, then the best of the rest, ties to the smaller id.

    ``scores`` is ``(batch, heads, rows, columns)`` from query block ``first_row`` on, column ``J`` being key block ``J``, with
    all causal blocks of the last row. NaN ranks above everything, so what dense attention would poison stays visible.
    Forced are the ``sink`` first blocks and the ``local`` ones up to the diagonal; ``budgets[i]`` blocks are kept in a row, at
    least these and at most the causal ones. If not ``inside``, these are added to the best ``budgets[i]`` of all. Returns int64
    ``(batch, heads, rows, width)``, ascending, padded with -1; inside, ``width`` is ``max(budgets)``.
    """
    columns, device = scores.shape[3], scores.device
    rows = torch.arange(first_row, first_row + len(budgets), device=device)[:, None]
    wanted = torch.tensor(budgets, device=device)[:, None].clamp(max=rows + 1)
    first = torch.arange(sink, device=device).expand(len(rows), -1)
    last = rows - torch.arange(local - 1, -1, -1, device=device)
    # Each once; ``columns`` stands for "none".
    forced = torch.cat([torch.where(first <= rows, first, columns), torch.where(last >= sink, last, columns)], -1)
    if inside:
        wanted = wanted - (forced < columns).sum(-1, keepdim=True)
    start, end = (sink, rows - local) if inside else (0, rows)
    # Blocks that may not be chosen here all come after the candidates or before the slice, so that the stable sort
    # prefers a candidate of score -inf to them.
    rest = scores[..., start:].masked_fill(torch.arange(columns, device=device)[start:] > end, -torch.inf)
    width = max(budgets, default=0)
    order = rest.sort(dim=-1, descending=True, stable=True).indices[..., :width] + start
    picked = torch.where(torch.arange(order.shape[-1], device=device) < wanted, order, columns)
    ids = torch.cat([picked, forced.expand(*scores.shape[:3], -1)], -1).sort(-1).values
    if inside:
        ids = ids[..., :width]
    else:
        ids[..., 1:][ids[..., 1:] == ids[..., :-1]] = columns  # forced, and among the best
        ids = ids.sort(-1).values
    return torch.where(ids < columns, ids, PAD)


def in_runs(rows: Iterable[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
    """Join scores of single query blocks, ``(batch, q_heads, row + 1)`` in order, into what :meth:`Ranked.scores` yields."""
    rows = iter(rows)
    while run := list(islice(rows, _RUN)):
        columns = run[-1][1].shape[2]
        padded = [torch.nn.functional.pad(scores, (0, columns - scores.shape[2])) for _, scores in run]
        yield run[0][0], torch.stack(padded, 2)
