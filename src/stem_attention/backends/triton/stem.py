"""Launch of Stem's selection: pool, score and choose, a bounded run of query blocks at a time."""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
from torch import Tensor

from stem_attention.backends.triton.launch import architecture, tile_launch
from stem_attention.backends.triton.layout import Layout
from stem_attention.backends.triton.program import Launches
from stem_attention.backends.triton.stem_kernels import choose_kernel, pool_keys, pool_queries, score_kernel
from stem_attention.backends.triton.tables import device_table, kept_per_stream
from stem_attention.blocks import block_count
from stem_attention.call import Call
from stem_attention.policies.metric import zscore_magnitude
from stem_attention.policies.stem import Stem

_COLUMNS_PER_WARP = 512


def select_by_score(call: Call, layout: Layout, dense_below: int, implicit: bool, launches: Launches) -> tuple[Tensor, Tensor]:
    """Choose the blocks that :class:`Stem` keeps; see :data:`stem_attention.backends.triton.backend.Selector`."""
    policy, q, k, v, packed = call.policy, call.q, call.k, call.v, layout.packed
    assert isinstance(policy, Stem)
    batch, heads, blocks, dim, padded = (
        layout.batch, layout.heads, layout.blocks, layout.dim, triton.next_power_of_2(layout.dim)
    )  # fmt: skip
    size, stride, inner = policy.block_size, policy.stride, policy.stride * dim
    lengths = (call.prompt_len,) if call.batch is None else call.batch.prompt_lens
    prompts = tuple((block_count(length, size), length < dense_below) for length in lengths)
    width = max(_list_width(policy, *prompt, layout.first, blocks, implicit) for prompt in prompts)
    indices = launches.empty((batch, heads, layout.rows, width), torch.int32, q.device)
    counts = launches.empty((batch, heads, layout.rows), torch.int32, q.device)
    if layout.rows == 0:
        return indices, counts
    budgets = _budget_table(q.device, policy, prompts)
    launches.keep(budgets)

    # 1. Group sums of the keys, as high and low bf16 parts or whole, and the values' term of the score.
    split = _splits(q)
    kind, warps = torch.bfloat16 if split else torch.float32, 2 if dim <= 128 else 4
    parts = size // stride if policy.magnitude == "zscore" else 1
    k_high = launches.empty((batch, layout.kv_heads, blocks, inner), kind, q.device)
    k_low = launches.empty(k_high.shape, kind, q.device) if split else k_high
    value = launches.empty((batch, layout.kv_heads, blocks, parts), torch.float32, q.device)
    launches.start(
        pool_keys, (blocks, layout.kv_heads, batch),
        k, v, k_high, k_low, value, layout.cu_k, layout.page_table, *layout.k_strides, *layout.v_strides, layout.table_stride,
        k.shape[0], layout.kv_len, blocks, policy.beta if policy.magnitude == "log" else 0.0, NORMS=parts, B=size, S=stride,
        D=dim, BD=padded, DV=layout.value_dim, BDV=triton.next_power_of_2(layout.value_dim), SPLIT=split, RAGGED=packed,
        PAGE=layout.page, num_warps=warps,
    )  # fmt: skip
    if policy.magnitude == "zscore":
        peaks = value.flatten(2)[..., : block_count(layout.kv_len, stride)]
        value = policy.beta * zscore_magnitude(peaks, layout.kv_len // stride, parts)

    tile = tile_launch("score", architecture(q.device))
    pitch = triton.cdiv(blocks, 16) * 16  # rows that begin at aligned addresses: else the score kernel spills
    step = layout.rows_at_once((inner + pitch) * 4, tile.rows)  # of pooled queries and scores
    q_high = launches.empty((batch, heads, step, inner), kind, q.device)
    q_low = launches.empty(q_high.shape, kind, q.device) if split else q_high
    scores = launches.empty((batch, heads, step, pitch), torch.float32, q.device)
    for first in range(0, layout.rows, step):
        rows = min(step, layout.rows - first)
        # 2. Group sums of the queries.
        launches.start(
            pool_queries, (rows, heads, batch),
            q, q_high, q_low, layout.cu_q, layout.cu_k, *layout.q_strides, layout.q_len, layout.kv_len, first, rows,
            B=size, S=stride, D=dim, BD=padded, SPLIT=split, RAGGED=packed, num_warps=warps,
        )  # fmt: skip
        # 3. Scores.
        tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(blocks, tile.columns)
        launches.start(
            score_kernel, (tiles, heads, batch),
            q_high, q_low, k_high, k_low, value, scores, layout.cu_q, layout.cu_k, layout.q_len, layout.kv_len, first, rows,
            blocks, pitch, call.scale, call.softcap, B=size, R=size // stride, G=layout.group, BM=tile.rows, BN=tile.columns,
            BK=tile.inner, WIDTH=inner, SPLIT=split, RAGGED=packed, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        # 4. The best of each row.
        seen = blocks if packed else min(blocks, layout.first + first + rows)
        columns = max(32, triton.next_power_of_2(seen))
        launches.start(
            choose_kernel, (rows, heads, batch),
            scores, budgets, indices, counts, layout.cu_q, layout.cu_k, budgets.shape[1] if len(prompts) > 1 else 0,
            layout.q_len, layout.kv_len, first, rows, layout.rows, pitch, width, B=size, SINK=policy.sink_blocks,
            LOCAL=policy.local_blocks, EXTRA=policy.forced == "extra", IMPLICIT=implicit, COLUMNS=columns, RAGGED=packed,
            num_warps=choice_warps(columns),
        )  # fmt: skip
    return indices, counts


def choice_warps(columns: int) -> int:
    """Return the warps that choose from a row of so many scores."""
    most = 8 if torch.version.hip else 16  # of AMD's warps, twice as wide, 16 leave too few registers
    return min(most, max(1, columns // _COLUMNS_PER_WARP))


def _splits(q: Tensor) -> bool:
    """Tell whether sums go as two bf16 numbers each; not on a CPU, whose interpreter computes bf16 wrongly."""
    return q.dtype in (torch.bfloat16, torch.float16) and q.device.type != "cpu"


def _ranked(policy: Stem, blocks: int, dense: bool) -> Sequence[int]:
    """Describe what the choice is asked for in each row of a prompt."""
    return range(1, blocks + 1) if dense else policy.ranked_counts(blocks)


@lru_cache(maxsize=256)
def _list_width(policy: Stem, blocks: int, dense: bool, first: int, end: int, implicit: bool) -> int:
    """The longest list that must be written for rows ``first`` to ``end`` of a prompt of ``blocks`` blocks."""
    most, ranked = policy.row_limits(blocks), _ranked(policy, blocks, dense)
    rows = range(first, min(end, blocks))
    return max((most[row] for row in rows if not implicit or ranked[row] <= row), default=1)


@kept_per_stream
def _budget_table(device: torch.device, policy: Stem, prompts: tuple[tuple[int, bool], ...]) -> Tensor:
    """int32 ``(prompts, longest)``, the numbers of :func:`_ranked`."""
    return device_table([_ranked(policy, blocks, dense) for blocks, dense in prompts], torch.int32, device)
