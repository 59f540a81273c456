"""Who takes part in an evaluation: a policy with its settings, if wanted with its size tuned to a density.

    NAME[:FIELD=VALUE,...][@DENSITY]

``stem:beta=0``, ``sink-window@0.18`` and ``uniform@stem`` are contenders: Stem without its value term; a window as wide as
18 % of the causal blocks allow; uniform top-k with the density of Stem's default. Sizes are tuned from budgets alone,
without data, for one prompt length at a time. ``mass:file=heads.json,share=6`` is a config from a file, with another share.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from stem_attention.config import StemConfig
from stem_attention.errors import bad_argument
from stem_attention.evaluation.row_range import RowRange, row_range
from stem_attention.policies import BigBird, Policy, UniformTopK, XAttention, make_policy, policy_names, policy_of
from stem_attention.policies.budget import block_count, row_budgets

if TYPE_CHECKING:
    from stem_attention.evaluation.measure import Record, What

DENSE = "dense"
PRESETS: dict[str, Callable[..., StemConfig]] = {
    "stem": StemConfig,
    "paper": StemConfig.paper,
    "angelslim": StemConfig.angelslim,
    "mass": StemConfig.mass,
}
TOLERANCE = 0.05
"""How far a tuned density may lie from its target, relative to it."""

Value: TypeAlias = str | int | float | bool | None

_WHOLE = (0.0, 1.0)
_RATIOS = ("ratio_short", "ratio_long")
_SIZES = {
    "sink-window": ("window_blocks",),
    "strided": ("window_blocks", "stride_blocks"),
    "longformer": ("window_blocks",),
    "bigbird": ("window_blocks", "random_blocks"),
}


class UnreachableDensityError(ValueError):
    """No size of a policy has the density asked for at that length: forced blocks are too many, or blocks too coarse."""


def contender_names() -> tuple[str, ...]:
    """What a spec may begin with."""
    return tuple(dict.fromkeys([DENSE, *PRESETS, *policy_names()]))


def read_value(text: str) -> Any:
    """The value of a ``FIELD=VALUE`` setting: JSON, or the text itself, so that names such as ``log`` need no quotes."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


@dataclass(frozen=True)
class Contender:
    """A policy, its settings and what its size is tuned to.

    Attributes:
        name: As in tables; unique in a run.
        family: One of :func:`contender_names`.
        settings: Fields that differ from the family's own.
        target: Density, or a contender whose density is to be met; None leaves the size as the settings have it. Layers
            that a config leaves dense (``dense_layers``) do not count.
        rows: Share of the query blocks that run sparse, all others keep everything; the target is about these rows.

    Raises:
        ValueError: A name or value is bad, or both a target and settings say how large the policy is.
    """

    name: str
    family: str
    settings: tuple[tuple[str, Value], ...] = ()
    target: float | Contender | None = None
    rows: tuple[float, float] = _WHOLE

    def __post_init__(self) -> None:
        if self.family not in contender_names():
            fix = "pick one of these names"
            raise bad_argument("policy", f"one of {', '.join(contender_names())}", repr(self.family), fix)
        what = self._build()
        if self.target is None:
            return
        if isinstance(self.target, float) and not 0 < self.target <= 1:
            raise bad_argument("density", "a number > 0 and <= 1", self.target, "0.2 keeps a fifth of the causal blocks")
        if what is None or _row_counts(what, 1) is None:
            fix = "leave the density out, or take a policy with a budget"
            raise bad_argument("density", "a policy whose size is known without data", self.family, fix)
        both = sorted(set(self._sizes()) & {name for name, _ in self.settings})
        if both and self.family != "strided":
            raise bad_argument("density", "settings that leave the size open", ", ".join(both), "give the size or the density")

    def at(self, tokens: int) -> What:
        """What to prefill a prompt of ``tokens`` tokens with.

        Raises:
            UnreachableDensityError: No size comes within 5 % of the target.
        """
        what = _sized_for(self, tokens)
        if self.rows == _WHOLE or what is None:
            return what
        return RowRange(policy_of(what) if isinstance(what, StemConfig) else what, self.rows)

    def is_reachable(self, tokens: int) -> bool:
        """Whether :meth:`at` can build the contender for that length."""
        try:
            self.at(tokens)
        except UnreachableDensityError:
            return False
        return True

    def density(self, tokens: int) -> float | None:
        """Kept share of the causal block pairs of the sparse rows, from budgets; None where only data can tell."""
        what = _sized_for(self, tokens)
        return self._density(what, tokens)

    def describe(self, tokens: int) -> Record:
        """Everything that makes it what it is at a length, as plain JSON types."""
        what = _sized_for(self, tokens)
        target = self.target.name if isinstance(self.target, Contender) else self.target
        record = {"name": self.name, "policy": self.family, "tokens": tokens, "target": target, "rows": list(self.rows)}
        return {**record, "density": self._density(what, tokens), "fields": _plain(what)}

    def _build(self, **sizes: Value) -> What:
        given = {**dict(self.settings), **sizes}
        if self.family == DENSE:
            if given:
                raise bad_argument("settings", "none for dense", ", ".join(given), "remove them")
            return None
        if self.family in PRESETS:
            named = _from_file(given.pop("file")) if "file" in given else {}
            return StemConfig.from_dict({**PRESETS[self.family]().to_dict(), **named, "dense_below": 0, **given})
        own = {name: value for name, value in given.items() if not (_has_config(self.family) and name in _CONFIG_FIELDS)}
        config = StemConfig.from_dict({"dense_below": 0, **{name: given[name] for name in given if name not in own}})
        return make_policy(self.family, config, **own)

    def _sizes(self) -> tuple[str, ...]:
        return _SIZES.get(self.family, (*_RATIOS, "scaling"))

    def _tuned(self, tokens: int) -> What:
        """The size nearest to the target; every family's density rises with its size."""
        if self.target is None:
            return self._build()
        target = self.target.density(tokens) if isinstance(self.target, Contender) else self.target
        if target is None:
            fix = "name a contender with a budget"
            raise bad_argument("density", "a contender whose density is known without data", repr(self.name), fix)
        blocks = block_count(tokens, _block_size(self._build()))

        def density(size: int) -> float:
            known = self._density(self._sized(size, blocks, target), tokens)
            assert known is not None  # __post_init__ refuses a target for policies without a budget
            return known

        best, nearest = _nearest(density, blocks, target)
        if abs(nearest / target - 1) > TOLERANCE:
            raise UnreachableDensityError(
                f"{self.name}: no density within {TOLERANCE:.0%} of {target:.3f} at {tokens} tokens, the nearest is "
                f"{nearest:.3f}; ask for another density, a longer prompt or fewer forced blocks"
            )
        return self._sized(best, blocks, target)

    def _sized(self, size: int, blocks: int, target: float) -> What:
        """The policy with room for about ``size`` blocks in a row of its first, largest budget."""
        if self.family == "strided":
            # About half of the density for the stride; the window, which is tuned, then has the other half.
            stride = dict(self.settings).get("stride_blocks", min(blocks, max(2, round(2 / target))))
            return self._build(window_blocks=size, stride_blocks=stride)
        if self.family == "bigbird":
            window = max(1, round(size * BigBird.window_blocks / (BigBird.window_blocks + BigBird.random_blocks)))
            return self._build(window_blocks=window, random_blocks=size - window)
        if self.family in _SIZES:
            return self._build(window_blocks=size)
        return self._build(ratio_short=size / blocks, ratio_long=size / blocks)

    def _density(self, what: What, tokens: int) -> float | None:
        if what is None:
            return 1.0
        counts = _row_counts(what, tokens)
        if counts is None:
            return None
        rows = row_range(self.rows, len(counts))
        return sum(counts[row] for row in rows) / sum(row + 1 for row in rows) if rows else 1.0


def _nearest(density: Callable[[int], float], most: int, target: float) -> tuple[int, float]:
    """The size from 1 to ``most`` whose density, which rises with it, is nearest to the target; and that density."""
    low, high = (1, density(1)), (most, density(most))
    while high[0] - low[0] > 1 and low[1] < target < high[1]:
        # Interpolated: counting the blocks of a long prompt takes a while, and density is nearly linear in the size.
        share = (target - low[1]) / (high[1] - low[1])
        size = min(max(round(low[0] + share * (high[0] - low[0])), low[0] + 1), high[0] - 1)
        found = size, density(size)
        low, high = (found, high) if found[1] < target else (low, found)
    return min(low, high, key=lambda found: abs(found[1] - target))


@lru_cache(maxsize=1024)  # every case of a length asks again
def _sized_for(contender: Contender, tokens: int) -> What:
    return contender._tuned(tokens)


_CONFIG_FIELDS = frozenset(StemConfig().to_dict())


def _from_file(file: Value) -> dict[str, Any]:
    """Fields of a config that a contender begins with."""
    try:
        content = json.loads(Path(str(file)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fix = "name a JSON file of StemConfig fields, such as stem-attention calibrate writes"
        raise bad_argument("file", "a readable JSON file", f"{file!r} ({error})", fix) from None
    if not isinstance(content, dict):
        got = f"a {type(content).__name__} in {file!r}"
        raise bad_argument("file", "one JSON object of StemConfig fields", got, "correct it")
    return content


def _has_config(family: str) -> bool:
    policy: Any = make_policy(family, StemConfig())
    return any(field.name == "config" for field in fields(policy))


def _block_size(what: Any) -> int:
    """Tokens per block of anything but dense."""
    size: int = getattr(what, "config", what).block_size
    return size


def _row_counts(what: StemConfig | Policy, tokens: int) -> tuple[int, ...] | None:
    """Blocks that each query block keeps, the same for every head; None where it depends on the data."""
    if isinstance(what, XAttention):
        return None
    config = what.as_stem().config if isinstance(what, UniformTopK) else getattr(what, "config", what)
    if isinstance(config, StemConfig):
        if config.keep == "mass":
            return None
        return row_budgets(config, block_count(tokens, config.block_size)) if config.forced == "inside" else None
    zeros = torch.zeros(1, 1, 1, 1).expand(1, tokens, 1, 1)
    counts: list[int] = config(zeros, zeros, zeros).counts[0, 0].tolist()
    return tuple(counts)


def _plain(what: Any) -> Record | None:
    if what is None or isinstance(what, StemConfig):
        return what.to_dict() if what else None
    values = {field.name: getattr(what, field.name) for field in fields(what)}
    return {name: value.to_dict() if isinstance(value, StemConfig) else value for name, value in values.items()}


def parse_contender(spec: str) -> Contender:
    """Read ``NAME[:FIELD=VALUE,...][@DENSITY]``; the contender is called like its spec.

    Raises:
        ValueError: The spec is not of that form, or names something that there is not.
    """
    text = spec.strip()
    rest, at, density = text.partition("@")
    family, _, listed = rest.partition(":")
    settings = tuple(_setting(part) for part in listed.split(",") if part.strip())
    target: float | Contender | None = None
    if at:
        value = read_value(density)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        target = float(value) if is_number else parse_contender(density)
    return Contender(text, family.strip(), settings, target)


def _setting(part: str) -> tuple[str, Value]:
    name, equals, value = (piece.strip() for piece in part.partition("="))
    parsed = read_value(value)
    if not equals or not name or isinstance(parsed, (list, dict)):
        raise bad_argument("policy", "FIELD=VALUE settings after the colon", repr(part), "as in stem:beta=0.1,tail_blocks=0")
    return name, parsed


def parse_contenders(specs: Iterable[str]) -> list[Contender]:
    """Read specs, each contender once."""
    return list(dict.fromkeys(parse_contender(spec) for spec in specs))
