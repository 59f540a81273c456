"""BlockSelection: what a policy hands to a kernel."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stem_attention.blocks import BlockGrid
from stem_attention.errors import bad_argument, describe, is_int, is_size

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

PAD = -1


@dataclass(frozen=True, eq=False)
class BlockSelection:
    """The key blocks that each query block of each head attends to.

    Blocks lie on absolute positions; queries are the last ``q_len`` of ``kv_len`` positions (bottom-right, as in
    FlashAttention). Row ``i`` is query block ``first_row + i``. Building one checks shapes and dtypes only, so it never
    waits for a GPU; :meth:`validate` checks the contents.

    Attributes:
        indices: int32 ``(batch, q_heads, rows, width)``, block ids ascending, padded with -1.
        counts: int32 ``(batch, q_heads, rows)``, ids that are present in each row.
        block_size: Tokens per block.
        q_len: Query tokens.
        kv_len: Key tokens, ``>= q_len``.

    Raises:
        ValueError: A field's type, dtype or shape is not as above.
    """

    indices: Tensor
    counts: Tensor
    block_size: int
    q_len: int
    kv_len: int

    def __post_init__(self) -> None:
        _check_lengths(self.block_size, self.q_len, self.kv_len)
        if not isinstance(self.indices, Tensor) or self.indices.dtype != torch.int32 or self.indices.dim() != 4:
            fix = "convert it, or use from_mask / from_lists"
            raise bad_argument("indices", "an int32 tensor (batch, q_heads, rows, width)", describe(self.indices), fix)
        if self.indices.shape[2] != self.rows:
            raise bad_argument(
                "indices", f"{self.rows} rows for q_len={self.q_len}, kv_len={self.kv_len}, block_size={self.block_size}",
                self.indices.shape[2], "give one row for every query block that the queries touch",
            )  # fmt: skip
        shape = tuple(self.indices.shape[:3])
        if not isinstance(self.counts, Tensor) or self.counts.dtype != torch.int32 or self.counts.shape != shape:
            fix = "count the ids of every row, or use from_mask / from_lists"
            raise bad_argument("counts", f"an int32 tensor {shape}", describe(self.counts), fix)

    @property
    def grid(self) -> BlockGrid:
        """Rows and columns of the selection."""
        return BlockGrid(self.q_len, self.kv_len, self.block_size)

    @property
    def first_row(self) -> int:
        """Absolute index of the first query block."""
        return self.grid.first_row

    @property
    def rows(self) -> int:
        """Query blocks that the queries touch; the first may hold fewer than ``block_size`` of them."""
        return self.grid.rows

    @property
    def key_blocks(self) -> int:
        """Key blocks, the last one possibly partial."""
        return self.grid.key_blocks

    def density(self) -> float:
        """Divide the kept block pairs by the causal ones, read off the counts. 1.0 when there is nothing to select."""
        pairs = self.counts.shape[0] * self.counts.shape[1] * self.grid.causal_pairs
        return int(self.counts.sum(dtype=torch.int64)) / pairs if pairs else 1.0

    def to_mask(self) -> Tensor:
        """Return bool ``(batch, q_heads, rows, key_blocks)``, True where a block is kept."""
        return _mask_of(self.indices, self.counts, self.key_blocks)

    @classmethod
    def from_mask(cls, mask: Tensor, *, block_size: int, q_len: int, kv_len: int) -> "BlockSelection":
        """Build from a bool block mask ``(batch, q_heads, rows, key_blocks)``, causal with a full diagonal, or a ValueError."""
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 4:
            expected = "bool (batch, q_heads, rows, key_blocks)"
            raise bad_argument("mask", expected, describe(mask), "build one entry per block pair")
        selection = cls(*padded_lists(mask), block_size, q_len, kv_len)
        if mask.shape[3] != selection.key_blocks:
            raise bad_argument(
                "mask", f"{selection.key_blocks} key blocks for kv_len={kv_len}, block_size={block_size}",
                mask.shape[3], "give one column for every key block",
            )  # fmt: skip
        selection.validate()
        return selection

    @classmethod
    def from_lists(
        cls, lists: Sequence[Sequence[Sequence[Sequence[int]]]], *, block_size: int, q_len: int, kv_len: int,
        device: torch.device | str | None = None,
    ) -> "BlockSelection":  # fmt: skip
        """Build from nested lists ``lists[batch][head][row]`` of block ids in any order.

        A ValueError where the nesting is ragged above the innermost level, or where :meth:`validate` refuses the ids.
        """
        place = None if device is None else check_device(device)
        _check_nesting(lists)
        heads = {len(per_head) for per_head in lists}
        rows = {len(per_row) for per_head in lists for per_row in per_head}
        if len(heads) != 1 or len(rows) != 1:
            got = f"head counts {sorted(heads)} and row counts {sorted(rows)}"
            raise bad_argument("lists", "the same heads in every batch entry and rows in every head", got, "fill the gaps")
        flat = [sorted(ids) for per_head in lists for per_row in per_head for ids in per_row]
        width = max((len(ids) for ids in flat), default=0)
        shape = (len(lists), heads.pop(), rows.pop())
        padded = [ids + [PAD] * (width - len(ids)) for ids in flat]
        indices = torch.tensor(padded, dtype=torch.int32, device=place).view(*shape, width)
        counts = torch.tensor([len(ids) for ids in flat], dtype=torch.int32, device=place).view(shape)
        selection = cls(indices, counts, block_size, q_len, kv_len)
        selection.validate()
        return selection

    @classmethod
    def of_window(
        cls, window: int, *, block_size: int, q_len: int, kv_len: int, batch: int = 1, q_heads: int = 1,
        device: torch.device | str | None = None,
    ) -> "BlockSelection":  # fmt: skip
        """Build the blocks that queries touch of whom each sees its own key and the ``window - 1`` before it.

        Blocks at the window's edge hold keys that are outside of it: pass the window to :func:`block_sparse_attention` too.
        """
        for name, value in (("window", window), ("batch", batch), ("q_heads", q_heads)):
            if not is_int(value) or value < 1:
                raise bad_argument(name, "an integer >= 1", repr(value), "a window counts the query's own key")
        _check_lengths(block_size, q_len, kv_len)
        place = None if device is None else check_device(device)
        grid = BlockGrid(q_len, kv_len, block_size)
        window = min(window, max(kv_len, 1))  # more keys than there are hide none, and may be too many for a tensor
        rows = torch.arange(grid.first_row, grid.end_row, device=place)
        first = (rows * block_size - window + 1).clamp(min=0) // block_size
        width = min(grid.key_blocks, (window + block_size - 2) // block_size + 1)
        ids = first[:, None] + torch.arange(width, device=place)
        ids = torch.where(ids <= rows[:, None], ids, PAD).to(torch.int32)
        counts = (rows - first + 1).to(torch.int32)
        shape = (batch, q_heads, grid.rows)
        return cls(ids.expand(*shape, width), counts.expand(shape), block_size, q_len, kv_len)

    def to_block_mask(self) -> "BlockMask":
        """Return the selection as a mask of torch's FlexAttention, for ``(batch, q_heads, length, dim)`` tensors.

        Its rows begin at the first query. Where that lies inside a block, a row touches two of the selection's: what one of
        them keeps is partial then, as the diagonal always is.
        """
        from torch.nn.attention.flex_attention import BlockMask  # loads torch.compile: seconds, so not at import

        kept, grid, size = self.to_mask(), self.grid, self.block_size
        start, first_row, device = grid.start, grid.first_row, kept.device
        begin = torch.arange(start, self.kv_len, size, device=device)
        rows = begin // size
        end_rows = ((begin + size).clamp(max=self.kv_len) - 1) // size
        upper, lower = kept[:, :, rows - first_row], kept[:, :, end_rows - first_row]
        full = upper & lower & (torch.arange(self.key_blocks, device=device) < rows[:, None])

        def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            position = query + start
            return (key <= position) & kept[batch, head, position // size - first_row, key // size]

        mask: BlockMask = BlockMask.from_kv_blocks(
            *lists_of((upper | lower) & ~full), *lists_of(full), BLOCK_SIZE=size, mask_mod=mask_mod,
            seq_lengths=(self.q_len, self.kv_len),
        )  # fmt: skip
        return mask

    @classmethod
    def from_block_mask(cls, mask: "BlockMask", *, batch: int = 1, q_heads: int = 1) -> "BlockSelection":
        """Build from a causal mask of torch's FlexAttention whose blocks below the diagonal are full or absent.

        ``batch`` and ``q_heads`` say for how many sequences and heads a mask stands that has one for all. The part of a
        diagonal block that the mask shows is taken to be the causal one. A ValueError where the mask is not such a mask.
        """
        lists = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
        selection = cls._from_partial_and_full(*lists, mask.BLOCK_SIZE, *mask.seq_lengths, batch, q_heads)
        if selection.kv_len > selection.block_size and selection.kv_len % selection.block_size:
            _check_last_row(selection.to_mask()[:, :, -1], mask, selection)
        return selection

    def to_fa4(self) -> dict[str, Any]:
        """Return the fields of FlashAttention-4's ``BlockSparseTensorsTorch``.

        They go with a ``mask_mod`` that is causal, as FlashAttention-4 applies it to partial blocks alone, which here is the
        diagonal one of each row. A ValueError where the first query lies inside a block: FlashAttention-4's rows begin with it.
        """
        _check_row_starts(self.q_len, self.kv_len, self.block_size)
        grid, device = self.grid, self.indices.device
        diagonal = torch.arange(grid.first_row, grid.end_row, dtype=torch.int32, device=device)
        return {
            # For every head: FlashAttention-4 takes counts of one head as a sign that all lists are shared.
            "mask_block_cnt": torch.ones_like(self.counts),
            "mask_block_idx": diagonal.expand(self.counts.shape)[..., None].contiguous(),
            "full_block_cnt": self.counts - 1,  # lists ascend, so the diagonal is the last entry
            "full_block_idx": self.indices.contiguous(),
            "block_size": (self.block_size, self.block_size),
        }

    @classmethod
    def from_fa4(cls, tensors: Any, *, q_len: int, kv_len: int, batch: int = 1, q_heads: int = 1) -> "BlockSelection":
        """Build from FlashAttention-4's ``BlockSparseTensorsTorch``; masks and errors as in :meth:`from_block_mask`."""
        lists = (tensors.mask_block_cnt, tensors.mask_block_idx, tensors.full_block_cnt, tensors.full_block_idx)
        return cls._from_partial_and_full(*lists, tensors.block_size, q_len, kv_len, batch, q_heads)

    def to_cudnn(self) -> dict[str, Any]:
        """Return what ``cudnn.block_sparse_attention`` (NVIDIA's cudnn-frontend) calls the selection, as keyword arguments.

        Its kernel masks nothing: a query sees the whole of its diagonal block, later tokens too. A ValueError where the first
        query lies inside a block.
        """
        _check_row_starts(self.q_len, self.kv_len, self.block_size)
        index = self.indices.clamp(min=0).contiguous()
        return {"q2k_block_index": index, "q2k_block_nums": self.counts, "sparse_block_size": self.block_size}

    @classmethod
    def from_cudnn(
        cls, q2k_block_index: Tensor, q2k_block_nums: Tensor, sparse_block_size: int, *, q_len: int, kv_len: int
    ) -> "BlockSelection":
        """Build from the arguments of ``cudnn.block_sparse_attention``; a ValueError as in :meth:`from_mask`."""
        _check_row_starts(q_len, kv_len, sparse_block_size)
        columns = BlockGrid(q_len, kv_len, sparse_block_size).key_blocks
        kept = _scatter(q2k_block_index, q2k_block_nums, columns)
        return cls.from_mask(kept, block_size=sparse_block_size, q_len=q_len, kv_len=kv_len)

    @classmethod
    def _from_partial_and_full(
        cls, partial_counts: Tensor, partial: Tensor, full_counts: Tensor | None, full: Tensor | None,
        block_size: tuple[int, int] | None, q_len: int, kv_len: int, batch: int, q_heads: int,
    ) -> "BlockSelection":  # fmt: skip
        """Build from lists of blocks that a kernel masks, and of blocks that it does not."""
        if block_size is None or block_size[0] != block_size[1]:
            raise bad_argument("block_size", "as many queries as keys", block_size, "build the mask with one block size")
        size = block_size[0]
        _check_row_starts(q_len, kv_len, size)
        grid = BlockGrid(q_len, kv_len, size)
        masked = _scatter(partial, partial_counts, grid.key_blocks)
        whole = torch.zeros_like(masked)
        if full is not None and full_counts is not None:
            whole = _scatter(full, full_counts, grid.key_blocks)
        kept = (masked | whole)[(None,) * (4 - masked.dim())]
        rows = torch.arange(grid.first_row, grid.end_row, device=kept.device)[:, None]
        diagonal = torch.arange(grid.key_blocks, device=kept.device) == rows
        # FlexAttention calls blocks partial whose queries run past the end, whatever they hold.
        sure = rows < kv_len // size
        if kept.shape[2] == grid.rows and bool(((masked & ~diagonal & sure) | (whole & diagonal)).any()):
            expected = "partial blocks on the diagonal alone, and none but partial ones there"
            raise bad_argument("mask", expected, "others", "a selection keeps whole blocks under a causal mask")
        wanted = [asked if own == 1 else own for own, asked in zip(kept.shape[:2], (batch, q_heads), strict=True)]
        return cls.from_mask(kept.expand(*wanted, -1, -1), block_size=size, q_len=q_len, kv_len=kv_len)

    def validate(self) -> None:
        """Check the contents, which on a GPU waits for the tensors.

        A ValueError where an id is out of range, not ascending, duplicate or after the diagonal; a row has no diagonal block; a
        count does not fit; or padding is not -1.
        """
        width = self.indices.shape[3]
        counts, device = self.counts[..., None], self.indices.device
        present = torch.arange(width, device=device) < counts
        diagonal = torch.arange(self.first_row, self.first_row + self.rows, device=device)[:, None]
        outside = present & ((self.indices < 0) | (self.indices > diagonal))
        falling = present[..., 1:] & (self.indices[..., 1:] <= self.indices[..., :-1])
        for problem, message in (
            ((counts < 1) | (counts > width), f"counts between 1 and width={width}"),
            (outside, "block ids between 0 and the row's diagonal block"),
            (falling, "strictly ascending block ids"),
            (~(present & (self.indices == diagonal)).any(-1), "every row to hold its diagonal block"),
            (~present & (self.indices != PAD), f"padding of {PAD} after each row's count"),
        ):
            if bool(problem.any()):
                raise bad_argument("selection", message, "something else", "build it with from_mask or from_lists")


def _check_lengths(block_size: int, q_len: int, kv_len: int) -> None:
    for name, value, least in (("block_size", block_size, 1), ("q_len", q_len, 0), ("kv_len", kv_len, 0)):
        if not is_size(value) or value < least:
            fix = "pass the tokens per block, the length of q and the length of k"
            raise bad_argument(name, f"an integer >= {least}", repr(value), fix)
    if q_len > kv_len:
        raise bad_argument("q_len", f"at most kv_len={kv_len}", q_len, "queries are the last q_len keys")


def check_device(device: torch.device | str) -> torch.device:
    """Return the device; a ValueError where it does not name one."""
    if isinstance(device, (str, torch.device)):
        with suppress(RuntimeError):
            return torch.device(device)
    raise bad_argument("device", "a torch device", repr(device), 'name one, as in "cpu" or "cuda:0"')


def lists_of(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and ascending lists of a bool block mask, each list with room for all key blocks; a GPU is not waited for."""
    columns = mask.shape[-1]
    places = torch.where(mask, mask.cumsum(-1, dtype=torch.int32) - 1, columns).long()
    ids = torch.arange(columns, dtype=torch.int32, device=mask.device).expand(mask.shape)
    room = torch.zeros(*mask.shape[:-1], columns + 1, dtype=torch.int32, device=mask.device)
    return mask.sum(-1, dtype=torch.int32), room.scatter_(-1, places, ids)[..., :columns].contiguous()


def padded_lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and counts of a bool block mask as a selection holds them, no wider than its longest list; waits for a GPU."""
    counts, ids = lists_of(mask)
    width = int(counts.max()) if counts.numel() else 0
    return torch.where(torch.arange(width, device=mask.device) < counts[..., None], ids[..., :width], PAD), counts


def _mask_of(indices: Tensor, counts: Tensor, columns: int) -> Tensor:
    """Bool mask ``(..., rows, columns)`` of lists whose first ``counts`` entries count."""
    present = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    mask = torch.zeros(*counts.shape, columns + 1, dtype=torch.bool, device=indices.device)
    return mask.scatter_(-1, torch.where(present, indices, columns).long(), True)[..., :columns]


def _scatter(indices: Tensor, counts: Tensor, columns: int) -> Tensor:
    """Build :func:`_mask_of` another library's lists; a ValueError where an entry is too large."""
    present = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    if bool((present & ((indices < 0) | (indices >= columns))).any()):
        raise bad_argument("mask", f"ids of {columns} key blocks", "others", "check the lengths")
    return _mask_of(indices, counts, columns)


def _check_row_starts(q_len: int, kv_len: int, block_size: int) -> None:
    """Refuse a first query inside a block."""
    if (kv_len - q_len) % block_size:
        expected = f"kv_len - q_len to be a multiple of block_size={block_size}"
        raise bad_argument("q_len", expected, f"{kv_len} - {q_len}", "begin chunks at a block's border")


def _check_nesting(lists: object) -> None:
    """Refuse what is not sequences of integers, four deep."""
    level: list[Any] = [lists]
    for _ in range(4):
        for part in level:
            if not isinstance(part, Sequence) or isinstance(part, str):
                expected = "sequences of block ids, four deep"
                raise bad_argument("lists", expected, type(part).__name__, "nest lists[batch][head][row]")
        level = [item for part in level for item in part]
    for item in level:
        if not is_int(item) or abs(item) >= 2**31:
            raise bad_argument("lists", "integers of 32 bits as block ids", repr(item), "turn them into int")


def _check_last_row(kept: Tensor, mask: "BlockMask", selection: BlockSelection) -> None:
    """Refuse a FlexAttention mask that shows parts of blocks ``kept`` by the last row, ``(batch, q_heads, key_blocks)``.

    FlexAttention calls all blocks of a row partial whose queries run past the end: here their tokens are looked at.
    """
    from torch.nn.attention.flex_attention import create_mask

    size, (batch, heads) = selection.block_size, mask.kv_num_blocks.shape[:2]
    rest = selection.kv_len // size * size
    first = max(rest - (selection.kv_len - selection.q_len), 0)  # a row may begin before the queries

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return mask.mask_mod(b, h, i + first, j)

    tokens = create_mask(seen, batch, heads, selection.q_len - first, rest, device=str(kept.device))
    whole = tokens.all(2).view(batch, heads, -1, size).all(3)
    if bool((kept[..., : rest // size] & ~whole).any()):
        raise bad_argument("mask", "whole blocks below the diagonal", "parts of some", "a selection keeps whole blocks")
