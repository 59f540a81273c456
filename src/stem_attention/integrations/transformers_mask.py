"""The masks that transformers hands to the layers of a model on "stem": as small as the layer's attention allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_MAPPING, PreTrainedConfig
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

from stem_attention.errors import UnsupportedError

# A sliding-window mask with more entries than this is never built whole: at 128K tokens it would take 16 GiB.
WINDOW_MASK_ENTRIES = 1 << 24


@dataclass(frozen=True)
class WindowMask:
    """A plain sliding-window causal mask in place of its entries.

    Attributes:
        window: Keys that a query sees, its own position among them.
        q_offset: Position of the first query.
        kv_offset: Position of the first key.
        padding: Bool ``(batch, positions)``, True where a position holds a token; None when all do.
    """

    window: int
    q_offset: int
    kv_offset: int
    padding: Tensor | None

    def piece(self, batch: int, rows: range, columns: range, device: torch.device) -> Tensor:
        """Bool ``(batch, 1, rows, columns)``, True where a query sees a key; ranges count from the offsets."""
        mask = sdpa_mask(
            batch_size=batch,
            q_length=len(rows),
            kv_length=len(columns),
            q_offset=self.q_offset + rows.start,
            kv_offset=self.kv_offset + columns.start,
            mask_function=sliding_window_causal_mask_function(self.window),
            attention_mask=self.padding,
            allow_is_causal_skip=False,
            device=device,
        )
        assert mask is not None  # no skip was allowed
        return mask


def stem_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    config: PreTrainedConfig | None = None,
    **kwargs: Any,
) -> Tensor | WindowMask | None:
    """transformers' mask hook for "stem"; it names and passes the arguments.

    Returns:
        None for a causal mask whose last row meets the last key. For a causal prefill with padding, or with a cache that is
        longer than what it holds, bool ``(batch, valid)``: keys after ``valid`` do not exist yet. A :class:`WindowMask`
        for a large sliding window. Otherwise bool ``(batch, 1, q_length, kv_length)``, as "sdpa" would get.

    Raises:
        UnsupportedError: The config belongs to a model class that would use the mask with its own attention.
    """
    compiling = torch.compiler.is_compiling()
    config_class: Any = type(config)
    stubborn = None if compiling else _class_with_own_attention(config_class)
    if stubborn is not None:
        raise own_attention_error(stubborn)
    plain = allow_is_causal_skip and q_length > 1 and not (compiling and _needs_values(q_offset, attention_mask))
    if plain and mask_function is causal_mask_function and kv_offset == 0:
        return _padding(batch_size, kv_length, int(q_offset) + q_length, attention_mask, kwargs.get("device"))
    is_window = local_size is not None and local_size == getattr(config, "sliding_window", None)
    is_window = is_window and getattr(config, "attention_chunk_size", None) is None
    if plain and is_window and local_size is not None and q_length * kv_length > WINDOW_MASK_ENTRIES:
        return WindowMask(local_size, int(q_offset), kv_offset, attention_mask)
    mask: Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # type: ignore[arg-type]  # a tensor works, and static caches pass one
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        # "sdpa" also skips the mask of an empty static cache and aligns the queries to the first keys then; here a
        # missing mask always means that they are aligned to the last ones.
        allow_is_causal_skip=allow_is_causal_skip and q_length in (1, kv_length),
        local_size=local_size,
        **kwargs,
    )
    return mask


@lru_cache(maxsize=256)
def _class_with_own_attention(config_class: type[Any]) -> str | None:
    """The model class of a config if it never calls the registered function: its masks must not be ours then."""
    if config_class not in MODEL_MAPPING:
        return None
    classes: Any = MODEL_MAPPING[config_class]
    classes = classes if isinstance(classes, tuple) else (classes,)
    names: list[str] = [cls.__name__ for cls in classes if not cls._can_set_attn_implementation()]
    return names[0] if names else None


def own_attention_error(model_class: str) -> UnsupportedError:
    """Build the error for a model class that does not use the attention interface."""
    return UnsupportedError(
        f"{model_class} keeps its own attention: its class does not use the attention interface of transformers; load it "
        'with attn_implementation="eager", or use another model class'
    )


def _needs_values(q_offset: int | Tensor, attention_mask: Tensor | None) -> bool:
    """Whether the small masks would have to read tensors, which a compiled graph cannot."""
    return attention_mask is not None or isinstance(q_offset, Tensor)


def _padding(batch: int, kv_length: int, valid: int, attention_mask: Tensor | None, device: Any) -> Tensor | None:
    if attention_mask is not None:
        missing = max(valid - attention_mask.shape[1], 0)
        attention_mask = torch.nn.functional.pad(attention_mask[:, :valid], (0, missing))
    if valid != kv_length:
        return torch.ones(batch, valid, dtype=torch.bool, device=device) if attention_mask is None else attention_mask
    return None if attention_mask is None or bool(attention_mask.all()) else attention_mask


def token_spans(padding: Tensor) -> list[tuple[int, int]] | None:
    """First and one-past-last real token of every row of a bool ``(batch, length)`` mask; None if a row has a hole.

    Reads the mask, so on a GPU it waits for it.
    """
    length, present = padding.shape[1], padding.int()
    first, after = present.argmax(1), length - present.flip(1).argmax(1)
    spans = torch.stack([first, after, present.sum(1)], 1).tolist()
    if any(count not in (0, end - start) for start, end, count in spans):
        return None
    return [(start, end) if count else (0, 0) for start, end, count in spans]


def causal_mask(padding: Tensor | None, q_len: int, kv_len: int, device: torch.device) -> Tensor:
    """Bool ``(batch or 1, 1, q_len, kv_len)``: causal, last query at the last key, padding hidden."""
    mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=device).tril(kv_len - q_len)[None, None]
    return mask if padding is None else mask & padding[:, None, None]
