"""Make q, k, v and selections. The same seed gives the same numbers on every device."""

import torch
from torch import Tensor

from stem_attention.blocks import BlockGrid
from stem_attention.errors import bad_argument
from stem_attention.selection import BlockSelection

LAYOUTS = ("bshd", "bhsd", "fused")

# Of structured inputs: how many topics there are, the logit between a query and a key of its topic (1 is the noise), and
# the spread of the natural logarithm of the value norms between topics.
_TOPICS = 12
_MATCH_LOGIT = 6.0
_VALUE_SPREAD = 2.5


def make_qkv(
    batch: int, q_len: int, kv_len: int, q_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu", seed: int = 0, layout: str = "bshd", value_dim: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Draw standard normal q, k and v. Their attention is nearly flat; see :func:`structured_qkv` for the opposite.

    Args:
        batch: Sequences.
        q_len: Queries of a sequence, the last ones of its keys.
        kv_len: Keys of a sequence, ``>= q_len``.
        q_heads: Query heads, a multiple of ``kv_heads``.
        kv_heads: Key and value heads.
        head_dim: Width of a head.
        dtype: Of all three; drawn in fp64 and rounded.
        device: Where they lie.
        seed: Of the random numbers.
        layout: One of :data:`LAYOUTS`, or a ValueError. ``"bshd"`` is contiguous in memory, ``"bhsd"`` has the heads before the
            positions (transformers' caches), ``"fused"`` slices a projection that has a position's q, k and v heads together.
        value_dim: Width of a value; ``head_dim`` unless given.

    Returns:
        ``q (batch, q_len, q_heads, head_dim)`` and ``k``, ``v (batch, kv_len, kv_heads, head_dim)``, whatever the layout;
        the last dimension of ``v`` is ``value_dim``.
    """
    draw = torch.Generator().manual_seed(seed)
    q = _normal(draw, batch, q_len, q_heads, head_dim)
    k, v = (_normal(draw, batch, kv_len, kv_heads, width) for width in (head_dim, value_dim or head_dim))
    return _lay_out(q, k, v, dtype, device, layout)


def structured_qkv(
    batch: int, q_len: int, kv_len: int, q_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu", seed: int = 0, layout: str = "bshd", value_dim: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Draw q, k and v whose attention is far from flat, as in a trained model; used as :func:`make_qkv`.

    The prompt is a row of passages, each about one of a few topics. Keys gather round their topic's direction, queries
    look for a topic, and the norms of the values differ between topics by orders of magnitude.
    """
    draw = torch.Generator().manual_seed(seed)
    centres = torch.nn.functional.normalize(_normal(draw, kv_heads, _TOPICS, head_dim), dim=-1)
    centres = centres * _MATCH_LOGIT**0.5 * head_dim**0.25  # so that the scaled product of a matching pair is the logit
    loudness = (_VALUE_SPREAD * _normal(draw, kv_heads, _TOPICS)).exp()

    def topics(length: int, heads: int, passage: int) -> Tensor:
        """``(batch, heads, length)``: one topic for each run of ``passage`` tokens."""
        drawn = torch.randint(_TOPICS, (batch, heads, -(-length // passage)), generator=draw)
        return drawn.repeat_interleave(passage, 2)[..., :length]

    about, wanted = topics(kv_len, kv_heads, 48), topics(q_len, q_heads, 80)
    kv_head = torch.arange(kv_heads)[:, None]
    q_head = torch.arange(q_heads)[:, None] // (q_heads // kv_heads)
    q = centres[q_head, wanted].transpose(1, 2) + _normal(draw, batch, q_len, q_heads, head_dim)
    k = centres[kv_head, about].transpose(1, 2) + _normal(draw, batch, kv_len, kv_heads, head_dim)
    v = loudness[kv_head, about].transpose(1, 2)[..., None] * _normal(draw, batch, kv_len, kv_heads, value_dim or head_dim)
    return _lay_out(q, k, v, dtype, device, layout)


def random_selection(
    batch: int, q_heads: int, q_len: int, kv_len: int, block_size: int, density: float = 0.4,
    device: torch.device | str = "cpu", seed: int = 0,
) -> BlockSelection:  # fmt: skip
    """Draw a valid selection whose rows and heads keep different blocks, and different numbers of them.

    ``density`` is the mean share of the causal blocks that are kept: every head has its own, from none to twice as many. The
    other arguments are those of :func:`make_qkv`, and ``block_size``, tokens per block.
    """
    draw = torch.Generator().manual_seed(seed)
    grid = BlockGrid(q_len, kv_len, block_size)
    rows, block = torch.arange(grid.first_row, grid.end_row)[:, None], torch.arange(grid.key_blocks)
    share = 2 * density * torch.rand((batch, q_heads, 1, 1), generator=draw)
    mask = torch.rand((batch, q_heads, grid.rows, grid.key_blocks), generator=draw) < share
    mask = (mask | (block == rows)) & (block <= rows)
    return BlockSelection.from_mask(mask.to(device), block_size=block_size, q_len=q_len, kv_len=kv_len)


def token_mask(selection: BlockSelection, window: int | None = None) -> Tensor:
    """Return bool ``(batch, q_heads, q_len, kv_len)``, True where a query attends to a key.

    The key is not later, of a kept block, and among the last ``window`` if that is given.
    """
    grid = selection.grid
    keys = torch.arange(grid.kv_len, device=selection.indices.device)
    queries = keys[grid.start :]
    rows = queries // grid.block_size - grid.first_row
    kept = selection.to_mask()[:, :, rows][..., keys // selection.block_size]
    kept = kept & (keys <= queries[:, None])
    return kept if window is None else kept & (keys > queries[:, None] - window)


def _normal(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def _lay_out(
    q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype, device: torch.device | str, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    if layout not in LAYOUTS:
        raise bad_argument("layout", f"one of {', '.join(LAYOUTS)}", repr(layout), "pick one of these names")
    q, k, v = (x.to(device=device, dtype=dtype) for x in (q, k, v))
    if layout == "bshd":
        return q.contiguous(), k.contiguous(), v.contiguous()
    if layout == "bhsd":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        return q, k, v
    (q_len, q_heads), (kv_len, kv_heads) = q.shape[1:3], k.shape[1:3]
    width = max(q.shape[3], v.shape[3])
    fused = torch.zeros((q.shape[0], kv_len, q_heads + 2 * kv_heads, width), dtype=dtype, device=device)
    q_part, k_part, v_part = torch.split(fused, [q_heads, kv_heads, kv_heads], 2)
    q_part, k_part, v_part = q_part[:, kv_len - q_len :, :, : q.shape[3]], k_part[..., : k.shape[3]], v_part[..., : v.shape[3]]
    return q_part.copy_(q), k_part.copy_(k), v_part.copy_(v)
