"""Describe which policy a model runs with: that of the ``with`` block it is called in, its own config's, or the default."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import ContextDecorator
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple
from weakref import WeakSet

import torch

from stem_attention.checks import check_dense_below
from stem_attention.errors import UnsupportedError, bad_argument
from stem_attention.policies import Mass, Policy, policy_from_dict, read_policy
from stem_attention.policies.base import check_integers
from stem_attention.selection import BlockSelection

KEY = "stem_attention"
"""Describe where a model's config holds its settings."""


@dataclass(frozen=True)
class LayerCall:
    """One attention call, as an observer learns of it.

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
class Settings:
    """Describe what a model runs with unless a ``with`` block says otherwise; fields as the arguments of ``set_policy``."""

    policy: Policy = field(default_factory=Mass)
    dense_below: int | None = None
    dense_layers: int = 0

    def __post_init__(self) -> None:
        check_dense_below(self.dense_below)
        check_integers(self, dense_layers=0)
        for layer in range(1024):  # torch.compile can read what each layer runs, but not make it
            try:
                if self.policy.for_layer(layer) is self.policy:
                    break
            except ValueError:  # one past the last layer
                break


class Stored(dict[str, Any]):
    """Settings as they lie in a model's config: JSON writes the dictionary, layers read the object."""

    def __init__(self, settings: Settings) -> None:
        super().__init__({**vars(settings), "policy": settings.policy.to_dict()})
        self.settings = settings

    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError("stored settings do not change; store others with set_policy")

    def __reduce__(self) -> tuple[type[Stored], tuple[Settings]]:
        return Stored, (self.settings,)


class Default:
    """Describe what models run with that store nothing."""

    settings = Settings()


_INNERMOST: ContextVar[use_policy] = ContextVar("innermost use_policy block")
_OPEN: set[use_policy] = set()


class use_policy(ContextDecorator):  # spelt as the verb it is, like torch.no_grad
    """Choose what models on "stem" keep, for the calls inside a ``with`` block or of a function that it decorates.

    Only the innermost block counts; what it leaves out comes from the model's config. A block holds for its own thread and
    asyncio task, for tasks created inside it and for ``asyncio.to_thread``. A thread started inside begins without it: give
    it ``target=use_policy(...)(model.generate)``. A generator shares the blocks of whoever runs it, so leave the block
    before each ``yield``.

    Args:
        policy: A policy, a spec such as ``"mass:share=8"``, or None for the model's own.
        dense_below: Prompts of fewer tokens run dense, with 0 none; None for the model's own.
        dense_layers: First layers that run dense; None for the model's own.
        observer: Called with a :class:`LayerCall` after every attention call. A padded batch gives one for each run of
            rows with equal padding. Without an observer selection and attention run as one call. Not inside a graph of
            ``torch.compile``.
        prompt_len: Tokens of the whole prompt, padding included, when prefill comes in chunks (``prefill_chunk_size``):
            layers see only the tokens that have come so far. Leave the block before the prompt grows.

    Raises:
        ValueError: An argument has the wrong type or range.
        RuntimeError: A block is entered that is open already.
        TypeError: It decorates a coroutine or a generator, whose body runs later.
    """

    # torch.compile can trace no ContextVar, but it reads and guards a property whose getter is built in. `get` is, and is
    # handed the object as the value to return outside of every block.
    innermost = property(_INNERMOST.get)
    outer: use_policy
    threads: WeakSet[threading.Thread]

    def __init__(
        self, policy: Policy | str | None = None, *, dense_below: int | None = None, dense_layers: int | None = None,
        observer: Observer | None = None, prompt_len: int | None = None,
    ) -> None:  # fmt: skip
        checked = Settings(read_policy(policy), dense_below, 0 if dense_layers is None else dense_layers)
        if observer is not None and not callable(observer):
            raise bad_argument("observer", "a callable or None", type(observer).__name__, "pass a function of one LayerCall")
        self.policy = None if policy is None else checked.policy
        self.dense_below, self.dense_layers, self.observer, self.prompt_len = dense_below, dense_layers, observer, prompt_len
        if prompt_len is not None:
            check_integers(self, prompt_len=1)
        self.is_used = self.left_early = False

    def __enter__(self) -> use_policy:
        if self in _OPEN:
            raise RuntimeError("this use_policy block is open already; build one for every `with`")
        self.outer, self.is_used, self.left_early = OUTSIDE.innermost, True, False
        self.threads = WeakSet(threading.enumerate())
        _OPEN.add(self)
        _INNERMOST.set(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _OPEN.discard(self)
        self.left_early = OUTSIDE.innermost is not self  # as blocks of interleaved generators are
        if not self.left_early:
            block = self.outer
            while block.left_early:
                block = block.outer
            _INNERMOST.set(block)

    def __call__(self, func: Any) -> Any:
        self.is_used = True
        if inspect.iscoroutinefunction(func) or inspect.isgeneratorfunction(func) or inspect.isasyncgenfunction(func):
            raise TypeError("use_policy decorates plain functions; write `with use_policy(...):` inside this one")
        return super().__call__(func)

    def _recreate_cm(self) -> use_policy:  # a block of its own for every call of a decorated function
        names = ("dense_below", "dense_layers", "observer", "prompt_len")
        return use_policy(self.policy, **{name: getattr(self, name) for name in names})

    def __del__(self) -> None:
        if self.__dict__.get("is_used") is False:
            message = "use_policy(...) was never entered and changed nothing: write `with use_policy(...):`"
            warnings.warn(message, RuntimeWarning, stacklevel=2)


OUTSIDE = use_policy()
"""Describe what holds outside of every block."""
OUTSIDE.is_used = True


class Now(NamedTuple):
    """Describe what one call of a layer runs with; fields as in :class:`use_policy`."""

    policy: Policy
    dense_below: int | None
    dense_layers: int
    observer: Observer | None
    prompt_len: int | None


def goes_backward() -> bool:
    """Tell whether this thread runs a backward pass, in which torch computes checkpointed layers again."""
    return torch._C._current_graph_task_id() != -1


def settings_now(config: Any) -> Now:
    """Put together what holds for a layer of a model with this config; an error says what the config stores badly."""
    block: use_policy = OUTSIDE.innermost
    compiling = torch.compiler.is_compiling()
    if block is OUTSIDE and _OPEN and not compiling and not goes_backward():
        thread = threading.current_thread()
        if any(thread not in each.threads for each in list(_OPEN)):
            said = "use_policy does not reach a thread started inside its block; start it with target=use_policy(...)(function)"
            warnings.warn(said, RuntimeWarning, stacklevel=2)
    stored = getattr(config, KEY, None)
    if stored is None:
        own = Default.settings
    elif isinstance(stored, Stored):
        own = stored.settings
    elif compiling:
        raise UnsupportedError("store settings with set_policy before torch.compile, which cannot parse the model's config")
    else:
        own = store(config, stored)
    return Now(
        own.policy if block.policy is None else block.policy,
        own.dense_below if block.dense_below is None else block.dense_below,
        own.dense_layers if block.dense_layers is None else block.dense_layers,
        block.observer, block.prompt_len,
    )  # fmt: skip


def store(config: Any, given: object) -> Settings:
    """Check settings, or the mapping that JSON makes of them, for a model, and put them into its (text) config."""
    settings = given if isinstance(given, Settings) else _parse(given)
    check_fit(settings.policy, config)
    setattr(config, KEY, Stored(settings))
    return settings


def check_fit(policy: Policy, config: Any) -> None:
    """Raise a ValueError if a policy was made for another model than that of a (text) config."""
    layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
    if isinstance(layers, int) and isinstance(heads, int):
        policy.check_model(layers, heads)


def _parse(given: object) -> Settings:
    names = vars(Default.settings)
    if not isinstance(given, Mapping) or not given.keys() <= names.keys():
        got = sorted(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
        fix = 'write it as {"policy": {"policy": "mass", "share": 8}}, or store settings with set_policy'
        raise bad_argument(f"config.{KEY}", f"a mapping with {', '.join(names)}", got, fix)
    policy = "mass" if given.get("policy") is None else given["policy"]
    # A model's config may come from anybody: it neither imports a module nor names a file to read.
    policy = policy_from_dict({"policy": policy} if isinstance(policy, str) else policy, trusted=False)
    return Settings(**{**given, "policy": policy})
