"""A policy: a frozen object that chooses key blocks for queries and carries the numbers of its rule."""

import dataclasses
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from functools import cache
from inspect import signature
from typing import Any, ClassVar, TypeGuard, TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

from stem_attention.blocks import block_count
from stem_attention.errors import bad_argument, is_int
from stem_attention.selection import BlockSelection

_T = TypeVar("_T")


class Policy(ABC):
    """Choose the key blocks that each query block attends to; a kernel then runs the choice.

    Subclasses are frozen dataclasses with the fields of their own rule, ``block_size`` among them. A subclass outside the
    library needs no more than that, a ``name`` and :meth:`__call__`: every backend and every host then runs it. Fields hold
    what JSON can, as a policy travels to operators, worker processes and files by its class and fields. A field of a wrong
    type, or outside its range, is a ValueError that names it.
    """

    name: ClassVar[str]
    """Short name for tables and the command line."""

    block_size: int
    """Tokens per block."""

    tail_blocks: int = 0
    """Last query blocks of the whole prompt that keep everything."""

    _json: str

    @abstractmethod
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, prompt_len: int | None = None
    ) -> BlockSelection:
        """Select.

        Args:
            q: ``(batch, q_len, q_heads, dim)``, the last ``q_len`` positions of ``kv_len``.
            k: ``(batch, kv_len, kv_heads, dim)``; query head ``h`` reads kv head ``h // (q_heads // kv_heads)``.
            v: The shape of ``k`` but for the last dimension.
            scale: Softmax scale, ``1 / sqrt(dim)`` unless given.
            prompt_len: Tokens of the whole prompt, ``>= kv_len``; ``kv_len`` unless prefill comes in chunks.

        A policy that looks at scores may take another argument, ``softcap: float | None = None``. It is then told of the soft
        cap of a model that has one, whose scores ``s`` are ``softcap * tanh(s / softcap)``.
        """

    def __post_init__(self) -> None:
        if torch.compiler.is_dynamo_compiling():
            fix = "build it outside of the compiled function"
            raise bad_argument("policy", "one that is there before torch.compile traces", f"a new {type(self).__name__}", fix)
        check_integers(self, block_size=1)
        self.check()
        for name, value in self.to_dict().items():
            try:
                json.dumps(value)
            except (TypeError, ValueError):  # noqa: PERF203  of the handful of fields, which one
                fix = "numbers, strings, None, and lists or tuples of these can travel"
                raise bad_argument(name, "a value that JSON can hold", type(value).__name__, fix) from None
        # Kept from construction on: torch.compile can trace neither the JSON encoder nor the checks.
        object.__setattr__(self, "_json", json.dumps(self.to_dict()))

    def check(self) -> None:  # noqa: B027  not abstract: there may be nothing to check
        """Check the fields once, when the policy is built; ``block_size`` has been checked."""

    def row_counts(self, num_blocks: int) -> tuple[int, ...] | None:
        """Count the blocks that each row of a prompt of ``num_blocks`` keeps; None where only the data can tell.

        Plain integers, without a tensor on the way: torch.compile asks while it traces.
        """
        return None

    def row_limits(self, num_blocks: int) -> tuple[int, ...]:
        """Bound the blocks that each row of a prompt of ``num_blocks`` keeps: a head keeps at most so many."""
        return self.row_counts(num_blocks) or tuple(range(1, num_blocks + 1))

    def density(self, tokens: int) -> float | None:
        """Share of the causal block pairs that a prompt of ``tokens`` keeps; None where only the data can tell."""
        counts = self.row_counts(block_count(tokens, self.block_size))
        if counts is None:
            return None
        return sum(counts) / sum(range(1, len(counts) + 1)) if counts else 1.0

    def for_layer(self, layer: int, heads: slice = slice(None)) -> "Policy":
        """Return what one layer of a model, counted from 0, runs: this policy, unless it has numbers for each layer.

        ``heads`` are those of its query heads that the call has: a rank of tensor parallelism has a part of them.
        """
        return self

    def check_model(self, layers: int, heads: int) -> None:  # noqa: B027  most policies fit every model
        """Raise ValueError if the policy was made for a model of other layers, or of other query heads a layer on all ranks."""

    def check_heads(self, heads: int) -> None:  # noqa: B027  as above
        """Raise ValueError if the policy is for another number of query heads than a call of one layer has."""

    def resized(self, size: int, blocks: int, density: float) -> Self:
        """Return the policy with room for about ``size`` of a prompt's ``blocks`` in its largest rows.

        Density rises with the size, from 1 to ``blocks``; ``density`` is the one that is looked for.
        """
        fix = "leave the density out, or take a policy with a budget or a window"
        raise bad_argument("policy", "one whose density can be tuned", self.name, fix)

    def to_dict(self) -> dict[str, Any]:
        """Return the policy's name and its fields as plain JSON types."""
        cls = type(self)
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
        return {"policy": self.name if is_ours(self) else f"{cls.__module__}:{cls.__qualname__}", **fields}

    def to_json(self) -> str:
        """Return :meth:`to_dict` as a JSON object; :func:`stem_attention.policies.policy_from_json` reads it back equal."""
        return self._json

    def once(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """Return ``make()``, kept with the policy: what follows from fields that never change is worked out once."""
        kept: dict[Hashable, _T] = self.__dict__.setdefault("_kept", {})
        if key not in kept:
            kept[key] = make()
        return kept[key]


def softcap_for(function: Callable[..., Any], softcap: float | None) -> dict[str, float]:
    """Return the arguments that tell a function of a policy of a soft cap: none where there is no cap, or it takes none."""
    return {} if softcap is None or not _takes_softcap(function) else {"softcap": softcap}


@cache
def _takes_softcap(function: Callable[..., Any]) -> bool:
    parameters = signature(function).parameters
    return "softcap" in parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def is_ours(policy: Policy) -> bool:
    """Tell the library's own policies from those that a user wrote."""
    return type(policy).__module__.startswith(Policy.__module__.removesuffix("base"))


def check_policy(policy: object) -> Policy:
    """Check that an object is a policy as the library can run it."""
    if isinstance(policy, type) and issubclass(policy, Policy):
        raise bad_argument("policy", "a policy", f"the class {policy.__name__}", f"build one: {policy.__name__}()")
    if not isinstance(policy, Policy):
        fix = 'pass Mass(), Stem.paper(), a spec such as "mass:share=8", or an instance of a subclass of Policy'
        raise bad_argument("policy", "a policy", f"{type(policy).__name__} {policy!r:.60}", fix)
    parameters = getattr(type(policy), "__dataclass_params__", None)
    if parameters is None or not parameters.frozen or not hasattr(policy, "_json"):
        fix = "decorate the class with @dataclass(frozen=True), and check fields in check() instead of __post_init__"
        raise bad_argument("policy", "a frozen dataclass", type(policy).__name__, fix)
    if not isinstance(getattr(policy, "name", None), str):
        fix = 'give the class one, as in name: ClassVar[str] = "nearest"'
        raise bad_argument("policy", "a policy with a name", type(policy).__name__, fix)
    return policy


def check_integers(policy: object, **least: int) -> None:
    """Check that each named field of a policy is an integer of at least the given value."""
    for name, smallest in least.items():
        value = getattr(policy, name, None)
        if not is_int(value) or value < smallest:
            raise bad_argument(name, f"an integer >= {smallest}", repr(value), f"pass {name}={smallest} or more")


def is_number(value: object) -> TypeGuard[float]:
    """Tell numbers, NaN and infinities among them, from all else, ``True`` and ``False`` too."""
    return is_int(value) or isinstance(value, float)


def check_number(policy: object, name: str, low: float = 0.0, high: float = sys.float_info.max, *, above: bool = False) -> None:
    """Check that a field of a policy is a finite number of at least (or ``above``) ``low``, and make it a float."""
    value = getattr(policy, name)
    if not is_number(value) or not low <= value <= high or (above and value == low):
        span = f"a finite number {'>' if above else '>='} {low:g}" + (f" and <= {high:g}" if high < 1e300 else "")
        raise bad_argument(name, span, repr(value), f"pass a {name} in that range")
    object.__setattr__(policy, name, float(value))


def check_choice(policy: object, name: str, choices: tuple[str, ...]) -> None:
    """Check that a field of a policy is one of some names."""
    value = getattr(policy, name)
    if value not in choices:
        raise bad_argument(name, f"one of {', '.join(choices)}", repr(value), "pick one of these names")


def check_divides(policy: object, *parts: str) -> None:
    """Check that each named field is an integer above 0 that divides ``block_size``."""
    size: int = policy.block_size  # type: ignore[attr-defined]
    for name in parts:
        check_integers(policy, **{name: 1})
        if size % getattr(policy, name):
            fix = f"change block_size or {name} so that one divides the other"
            raise bad_argument("block_size", f"a multiple of {name}={getattr(policy, name)}", size, fix)
