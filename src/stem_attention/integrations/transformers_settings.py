"""Which policy a transformers model runs with: its own config's, or that of the context it is called in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from transformers import PreTrainedModel

from stem_attention.config import StemConfig
from stem_attention.errors import UnsupportedError, bad_argument
from stem_attention.integrations.transformers_mask import own_attention_error
from stem_attention.policies import Policy
from stem_attention.selection import BlockSelection

NAME = "stem"
_DEFAULT = StemConfig()


@dataclass(frozen=True)
class LayerCall:
    """What an observer learns of one attention call.

    Attributes:
        layer: Index of the layer, -1 when the module does not say.
        q_len: Query tokens.
        kv_len: Key tokens, cached ones included.
        sparse: Whether a policy selected the blocks.
        reason: Why the call was dense; ``"prefill"`` when it was sparse.
        selection: The kept blocks of a sparse call, None for a dense one.
        seconds: Time on the host. A GPU may still be at work then: synchronise in the observer to time it.
    """

    layer: int
    q_len: int
    kv_len: int
    sparse: bool
    reason: str
    selection: BlockSelection | None
    seconds: float

    @property
    def density(self) -> float:
        """Kept share of the causal block pairs; 1 for a dense call."""
        return 1.0 if self.selection is None else self.selection.density()


Observer = Callable[[LayerCall], object]


@dataclass(frozen=True)
class Overrides:
    """What :func:`configure` was given."""

    policy: StemConfig | Policy | None = None
    observer: Observer | None = None
    prompt_len: int | None = None


# Not a ContextVar: torch.compile cannot trace one, but it reads and guards thread-local attributes.
class _Local(threading.local):
    overrides = Overrides()


_LOCAL = _Local()


def overrides() -> Overrides:
    """What the innermost :func:`configure` of this thread says."""
    return _LOCAL.overrides


@contextmanager
def configure(
    policy: StemConfig | Policy | None = None, *, observer: Observer | None = None, prompt_len: int | None = None
) -> Iterator[None]:
    """Choose how models on "stem" select blocks, for the calls of this thread inside the ``with`` block.

    Contexts do not add up: inside, only the innermost one counts.

    Args:
        policy: A config, which then replaces the model's own; or a policy, which selects in every prefill, whatever its
            length (``dense_below`` and ``dense_layers`` belong to configs); or None for the model's own config.
        observer: Called with a :class:`LayerCall` after every attention call. A padded batch gives one for each run of
            rows with equal padding. Without an observer selection and attention run as one call. Not inside a graph of
            ``torch.compile``.
        prompt_len: Tokens of the whole prompt, padding included, when prefill comes in chunks (``prefill_chunk_size``):
            layers see only the tokens that have come so far. Leave the context before the prompt grows.

    Raises:
        ValueError: An argument has the wrong type or range.
    """
    if policy is not None and not isinstance(policy, StemConfig) and not callable(policy):
        raise bad_argument("policy", "a StemConfig, a policy or None", type(policy).__name__, "build one with StemConfig(...)")
    if observer is not None and not callable(observer):
        raise bad_argument("observer", "a callable or None", type(observer).__name__, "pass a function of one LayerCall")
    if prompt_len is not None and (isinstance(prompt_len, bool) or not isinstance(prompt_len, int) or prompt_len < 1):
        raise bad_argument("prompt_len", "an integer >= 1 or None", repr(prompt_len), "count the tokens of the whole prompt")
    before = _LOCAL.overrides
    _LOCAL.overrides = Overrides(policy, observer, prompt_len)
    try:
        yield
    finally:
        _LOCAL.overrides = before


class StoredConfig(dict[str, Any]):
    """A StemConfig as it lies in a model's config: JSON writes the fields, torch.compile reads the parsed object."""

    def __init__(self, config: StemConfig) -> None:
        super().__init__(config.to_dict())
        self.config = config

    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError("a stored StemConfig does not change; store another one with set_config")

    def __reduce__(self) -> tuple[type[StoredConfig], tuple[StemConfig]]:
        return StoredConfig, (self.config,)


def set_config(model: PreTrainedModel, config: StemConfig | None = None) -> None:
    """Store a config in the (text) config of a model, with which it is saved and loaded again.

    ``model.config.stem_attention = config.to_dict()`` does the same without the checks.

    Args:
        model: A model loaded with ``attn_implementation="stem"``.
        config: None keeps what the model's config holds; a reloaded model needs that once before ``torch.compile``.

    Raises:
        ValueError: ``model`` is no model, ``config`` is not a StemConfig, or the model's config holds a bad one.
        UnsupportedError: The model's class cannot take the attention function, or the model was loaded with another one.
    """
    if not isinstance(model, PreTrainedModel):
        raise bad_argument("model", "a model of transformers", type(model).__name__, "load one with from_pretrained")
    if config is not None and not isinstance(config, StemConfig):
        raise bad_argument("config", "a StemConfig or None", type(config).__name__, "build one with StemConfig(...)")
    text = model.config.get_text_config(decoder=True)
    owners = [part for part in model.modules() if isinstance(part, PreTrainedModel) and part.config is text] or [model]
    for owner in owners:
        if not owner._can_set_attn_implementation():
            raise own_attention_error(type(owner).__name__)
    if text._attn_implementation != NAME:
        raise UnsupportedError(
            f'{type(model).__name__} runs attn_implementation="{text._attn_implementation}"; call register() and then '
            f'model.set_attn_implementation("{NAME}")'
        )
    text.stem_attention = StoredConfig(model_config(text) if config is None else config)


def model_config(host_config: Any) -> StemConfig:
    """The StemConfig that a model's config holds, ``StemConfig()`` if none.

    Raises:
        ValueError: It is not a mapping of StemConfig fields.
        UnsupportedError: Inside torch.compile, and it was not stored by :func:`set_config`.
    """
    stored = getattr(host_config, "stem_attention", None)
    if stored is None:
        return _DEFAULT
    if isinstance(stored, StoredConfig):
        return stored.config
    if torch.compiler.is_compiling():
        raise UnsupportedError("call set_config(model) before torch.compile, which cannot parse the model's stem_attention")
    if isinstance(stored, dict) and all(isinstance(value, Hashable) for value in stored.values()):
        return _parse(tuple(stored.items()))
    return StemConfig.from_dict(stored)


@lru_cache(maxsize=256)
def _parse(items: tuple[tuple[str, Any], ...]) -> StemConfig:
    return StemConfig.from_dict(dict(items))
