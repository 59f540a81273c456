"""Token Position-Decay: how many key blocks each query block may keep (paper, section 4).

Plain integers on the host: the schedule depends on the prompt's length alone, so it costs no device work and is the
same for every head, chunk and backend.
"""

from __future__ import annotations

import math
from functools import lru_cache

from stem_attention.config import ANGELSLIM_EXTRA_BLOCKS, ANGELSLIM_KEEP_ALL_BELOW, StemConfig

# Products such as 0.1 * 1280 land a hair above the integer they mean; ceil must not round that hair up.
_HAIR = 1e-9


def block_count(length: int, block_size: int) -> int:
    """Blocks that ``length`` tokens touch: ``NB = ceil(length / block_size)``."""
    return -(-length // block_size)


def first_row_budget(config: StemConfig, num_blocks: int) -> int:
    """``k_start``: blocks the first query blocks of a prompt of ``num_blocks`` blocks may keep."""
    knee_blocks = config.knee_tokens / config.block_size
    short, long = config.ratio_short * num_blocks, config.ratio_long * num_blocks
    if config.schedule == "smooth":
        wanted = math.ceil(min(short, max(long, config.ratio_short * knee_blocks)) - _HAIR)
    elif config.schedule == "step":
        wanted = math.ceil((short if num_blocks <= math.ceil(knee_blocks) else long) - _HAIR)
    elif num_blocks < ANGELSLIM_KEEP_ALL_BELOW:
        wanted = num_blocks
    else:
        wanted = int(short if num_blocks < knee_blocks else long) + ANGELSLIM_EXTRA_BLOCKS
    floor = config.sink_blocks + config.local_blocks if config.min_blocks is None else config.min_blocks
    return min(max(wanted, floor), num_blocks)


def scored_budget(config: StemConfig, num_blocks: int, row: int) -> int:
    """``k(I)``: the decayed budget of query block ``row``, before forced blocks and the causal limit."""
    k_start = first_row_budget(config, num_blocks)
    if config.schedule != "angelslim":
        return math.ceil(k_start - k_start * (1 - config.decay) * row / num_blocks - _HAIR)
    falling = num_blocks - k_start
    if row < k_start or falling <= 1:
        return k_start
    end = k_start * config.decay
    return max(1, math.floor(k_start + (end - k_start) * (row - k_start) / (falling - 1) + _HAIR))


def forced_count(config: StemConfig, row: int) -> int:
    """``|forced(I)|``: sink and local blocks among the ``row + 1`` causal ones."""
    return min(row + 1, config.sink_blocks + config.local_blocks)


@lru_cache(maxsize=256)
def row_budgets(config: StemConfig, num_blocks: int) -> tuple[int, ...]:
    """``n(I)`` for every query block of a prompt of ``num_blocks`` blocks: blocks that row keeps.

    With ``forced="extra"`` the forced blocks may overlap the top-k, so a head's row keeps *at most* this many. Under
    ``keep="mass"`` only the data can tell, and this is everything.
    """
    if config.keep == "mass":
        return tuple(range(1, num_blocks + 1))
    counts = []
    for row in range(num_blocks):
        wanted, forced = scored_budget(config, num_blocks, row), forced_count(config, row)
        total = wanted + forced if config.forced == "extra" else max(wanted, forced)
        is_tail = row >= num_blocks - config.tail_blocks
        counts.append(row + 1 if is_tail else min(row + 1, total))
    return tuple(counts)


@lru_cache(maxsize=256)
def ranked_budgets(config: StemConfig, num_blocks: int) -> tuple[int, ...]:
    """What the choice by score is asked for in every row; ``row + 1`` or more is everything.

    With ``forced="inside"`` that is all a row keeps, with ``"extra"`` the top-k to which forced blocks are then added.
    """
    if config.forced == "inside":
        return row_budgets(config, num_blocks)
    tail = num_blocks - config.tail_blocks
    return tuple(row + 1 if row >= tail else scored_budget(config, num_blocks, row) for row in range(num_blocks))
