"""The masks that transformers hands to the layers of a model on "stem": real tensors, as small as attention allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedConfig
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask

from stem_attention.errors import UnsupportedError
from stem_attention.integrations.transformers.model import is_eager_only
from stem_attention.selection import BlockSelection

# Entries of a mask are built whole, and kept, up to this many: at 128K tokens they would take 16 GiB.
WHOLE_MASK_ENTRIES = 1 << 24

_aten = torch.ops.aten
_ALL = slice(None)
_COPIES = (_aten.alias.default, _aten.clone.default, _aten.detach.default)


class CausalMask(Tensor):
    """Bool ``(batch, 1, q_len, kv_len)``, True where a query sees a key, like any such mask, but without its entries.

    Slices and copies stay so; whatever else reads it gets the entries.

    Attributes:
        first: Place of the first query among the keys: query ``i`` sees keys up to ``first + i``.
        window: Keys that a query sees at most, its own among them; None when no query loses a key to it.
        padding: Bool ``(batch, kv_len)``, True where a key is a token; None when all are.
        changed: Whether something may have written to the entries through a view of them: just they are true then.
    """

    first: int
    window: int | None
    padding: Tensor | None
    changed: bool

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(cls, shape: Sequence[int], first: int, window: int | None, padding: Tensor | None, device: Any) -> CausalMask:
        mask: CausalMask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        mask.first, mask.padding, mask.changed = first, padding, False
        mask.window = None if window is None or first + shape[2] <= window else window
        return mask

    @property
    def is_large(self) -> bool:
        """Tell whether its entries are too many to be built whole."""
        return prod(self.shape) > WHOLE_MASK_ENTRIES

    @property
    def seen(self) -> int:
        """Keys up to the last query; later ones do not exist yet."""
        return self.first + self.shape[2]

    @cached_property
    def spans(self) -> list[tuple[int, int]] | None:
        """First and one-past-last token of each row among the keys that are seen; None without padding, or with a hole."""
        if self.padding is None:
            return None
        present = self.padding[:, : self.seen].int()
        first, after = present.argmax(1), self.seen - present.flip(1).argmax(1)
        spans = torch.stack([first, after, present.sum(1)], 1).tolist()  # waits for a GPU
        if any(count not in (0, end - start) for start, end, count in spans):
            return None
        return [(start, end) if count else (0, 0) for start, end, count in spans]

    @cached_property
    def seen_part(self) -> CausalMask:
        """The mask without the keys that do not exist yet: a static cache may have room for many."""
        return self.part(_ALL, slice(self.seen))

    def window_blocks(self, window: int, **shape: Any) -> BlockSelection:
        """Call :meth:`BlockSelection.of_window`, once for all layers with this mask, which a prefill has for itself."""
        key = window, *sorted(shape.items())
        if key not in self._window_blocks:
            self._window_blocks[key] = BlockSelection.of_window(window, **shape)
        return self._window_blocks[key]

    @cached_property
    def _window_blocks(self) -> dict[tuple[Any, ...], BlockSelection]:
        return {}

    def entries(self) -> Tensor:
        """Build the mask as a plain tensor, which is kept unless it is large."""
        keep = self.changed or not (self.is_large or torch.compiler.is_compiling())
        return self._whole if keep else self._built()

    @cached_property
    def _whole(self) -> Tensor:
        return self._built()

    def _built(self) -> Tensor:
        visible = causal_entries(self.shape[2], self.shape[3], self.first, self.window, self.device)
        return visible.repeat(self.shape[0], 1, 1, 1) if self.padding is None else visible & self.padding[:, None, None]

    def part(self, queries: slice, keys: slice) -> CausalMask:
        """The mask of some queries and keys."""
        (batch, _, q_len, kv_len), padding = self.shape, self.padding
        (top, bottom, _), (left, right, _) = queries.indices(q_len), keys.indices(kv_len)
        shape = (batch, 1, max(0, bottom - top), max(0, right - left))
        padding = None if padding is None else padding[:, keys]
        return CausalMask(shape, self.first + top - left, self.window, padding, self.device)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        mask: Any = args[0] if args else None
        kwargs = kwargs or {}
        if isinstance(mask, CausalMask) and not mask.changed:
            if func is _aten.slice.Tensor:
                dim, start, end, step = (list(args[1:]) + [0, None, None, None][len(args) - 1 :])[:4]
                dim, cut = dim % 4, slice(start, end, step)
                if dim >= 2 and cut.step in (None, 1):
                    return mask.part(cut, _ALL) if dim == 2 else mask.part(_ALL, cut)
            if func in _COPIES or (func is _aten._to_copy.default and kwargs.get("dtype", torch.bool) is torch.bool):
                device = kwargs.get("device") or mask.device
                padding = None if mask.padding is None else mask.padding.to(device)
                return CausalMask(mask.shape, mask.first, mask.window, padding, device)
            if func._schema.is_mutable:
                raise UnsupportedError(f"a mask of Stem cannot be written to ({func}); write to a copy, (mask & True)")
            mask.changed = func.is_view
        args, kwargs = tree_map_only(CausalMask, CausalMask.entries, (args, kwargs))
        return func(*args, **kwargs)


def causal_entries(q_len: int, kv_len: int, first: int, window: int | None, device: torch.device) -> Tensor:
    """Build bool ``(1, 1, q_len, kv_len)``, True where a query sees a key; arguments as in :class:`CausalMask`."""
    last, keys = torch.arange(q_len, device=device)[:, None] + first, torch.arange(kv_len, device=device)
    visible = keys <= last
    return (visible if window is None else visible & (keys > last - window))[None, None]


def stem_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function, attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True, local_size: int | None = None, config: PreTrainedConfig | None = None,
    device: Any = "cpu", **kwargs: Any,
) -> Tensor | None:  # fmt: skip
    """Build a mask for "stem". transformers calls this; it names and passes the arguments.

    Returns:
        None for a causal mask whose last row meets the last key. A :class:`CausalMask` where there is padding, a cache that is
        longer than what it holds, or a window. Otherwise bool ``(batch, 1, q_length, kv_length)``, as "sdpa" would get; for a
        class that supports eager attention alone, the mask of "eager".
    """
    given: dict[str, Any] = {
        "batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset, "kv_offset": kv_offset,
        "mask_function": mask_function, "attention_mask": attention_mask, "local_size": local_size, "device": device, **kwargs,
    }  # fmt: skip
    if is_eager_only(config):
        return eager_mask(**given)
    compiling = torch.compiler.is_compiling()
    readable = not compiling or (attention_mask is None and isinstance(q_offset, int))  # a compiled graph cannot read tensors
    if allow_is_causal_skip and q_length > 1 and readable:
        first = int(q_offset) - kv_offset
        reached = local_size is not None and int(q_offset) + q_length > local_size
        size, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
        is_window = local_size == size and chunk is None
        if mask_function is causal_mask_function or (local_size is not None and (not reached or is_window)):
            padding = None if attention_mask is None else attention_mask[:, kv_offset : kv_offset + first + q_length]
            if padding is not None:
                is_whole = padding.shape[1] == first + q_length and bool(padding.all())  # waits for a GPU
                padding = None if is_whole else torch.nn.functional.pad(padding, (0, kv_length - padding.shape[1]))
            if not reached and padding is None and first + q_length == kv_length:
                return None
            if not compiling:
                shape, window = (batch_size, 1, q_length, kv_length), local_size if reached else None
                mask = CausalMask(shape, first, window, padding, torch.device(device))
                return mask if mask.is_large or not reached else mask.entries()
    # "sdpa" also skips the mask of an empty static cache and aligns the queries to the first keys then; here a missing mask
    # always means that they are aligned to the last ones.
    entries: Tensor | None = sdpa_mask(**given, allow_is_causal_skip=allow_is_causal_skip and q_length in (1, kv_length))
    return entries
