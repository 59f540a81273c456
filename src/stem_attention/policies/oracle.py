"""The oracle: blocks ranked by the attention mass that they truly hold. It costs more than dense attention."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stem_attention.blocks import BlockGrid
from stem_attention.policies.metric import accumulator_dtype, capped, grouped_product
from stem_attention.policies.ranked import Ranked, in_runs

# Weights held at a time, in elements (64 MiB in fp32; while the softmax runs there are two of them).
_WORKSPACE = 1 << 24


@dataclass(frozen=True)
class Oracle(Ranked):
    """Spend a budget on the heaviest blocks.

    A block's score is its softmax mass in exact dense attention, averaged over the query block's rows, head by head: what
    any cheap score could hope to guess. It is meant as an upper bound in comparisons and never for speed. For the fields see
    :class:`stem_attention.policies.Ranked`.
    """

    name = "oracle"

    def scores(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        grid = BlockGrid.of(q, k, self.block_size)
        return in_runs(
            (row, block_mass(q, k, scale, self.block_size, row, softcap)) for row in range(grid.first_row, grid.end_row)
        )


def block_mass(q: Tensor, k: Tensor, scale: float, block_size: int, row: int, softcap: float | None = None) -> Tensor:
    """Work out the share of dense causal attention that one query block gives to each key block, averaged over its rows.

    ``q`` and ``k`` are as a policy gets them; ``q`` has queries of the absolute block ``row``. Returns
    ``(batch, q_heads, row + 1)`` in fp32 (fp64 for fp64 input), which sums to 1 over the blocks.
    """
    grid, dtype, group = BlockGrid.of(q, k, block_size), accumulator_dtype(q), q.shape[2] // k.shape[2]
    low, high = grid.row_positions(row)
    queries = (q[:, grid.query_slice(row, row + 1)].to(dtype) * scale).transpose(1, 2)
    future = torch.ones(high - low, high - low, dtype=torch.bool, device=q.device).triu(1)
    room = max(1, _WORKSPACE // (q.shape[0] * (high - low) * high))  # query heads
    outer, inner = max(1, room // group), min(room, group)  # of kv heads, and of each one's query heads
    masses = []
    for g in range(0, k.shape[2], outer):
        keys, end = k[:, :high, g : g + outer].to(dtype).transpose(1, 2), (g + outer) * group
        for head in range(g * group, end, outer * inner):
            weights = capped(grouped_product(queries[:, head : min(head + outer * inner, end)], keys), softcap)
            weights[..., low:].masked_fill_(future, -torch.inf)
            masses.append(torch.softmax(weights, -1).mean(2))
    mean = torch.nn.functional.pad(torch.cat(masses, 1), (0, -high % block_size))
    return torch.unflatten(mean, 2, (-1, block_size)).sum(3)
