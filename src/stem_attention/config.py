"""StemConfig: every number of the method, validated once."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stem_attention.errors import bad_argument

MAGNITUDES = ("log", "zscore", "none")
SCHEDULES = ("smooth", "step", "angelslim")
FORCED_RULES = ("inside", "extra")
KEEP_RULES = ("budget", "mass")

# Constants of the public code's schedule, in blocks: prompts shorter than the first keep everything, longer ones
# get the second on top of their ratio.
ANGELSLIM_KEEP_ALL_BELOW = 56
ANGELSLIM_EXTRA_BLOCKS = 30

# Fields that mean something under one rule only: under the other they must be left alone, so that no setting does nothing.
_ONLY: dict[str, tuple[str, ...]] = {
    "budget": (
        "stride", "beta", "magnitude", "decay", "schedule", "ratio_short", "ratio_long", "knee_tokens", "min_blocks", "forced",
    ),
    "mass": ("share", "spread", "query_pool", "key_pool", "head_factors"),
}  # fmt: skip

# Where the default departs from the paper and the public code (docs/evidence.md says why).
_PUBLISHED: dict[str, Any] = {"sink_blocks": 4, "local_blocks": 4, "tail_blocks": 0}


@dataclass(frozen=True)
class StemConfig:
    """Configuration of Stem (arXiv 2603.06274). Immutable; every field changes the result.

    Blocks lie on absolute positions: block ``J`` holds tokens ``[J * block_size, (J + 1) * block_size)``. Fields that belong
    to the other ``keep`` rule are refused when they are set.

    Attributes:
        keep: Which blocks a row keeps besides the forced ones. ``"budget"``: the published method, as many of the best as the
            schedule allows. ``"mass"``: every block that may hold ``share`` of what an average block gets, however many those
            are (:class:`stem_attention.policies.Mass`).
        block_size: Tokens per block (``B``). A multiple of ``stride``, or of both pools.
        share: Of ``"mass"``: a block is kept if any pool of queries of the row may give it at least ``share / NB`` of its
            attention, ``NB`` being the blocks of the whole prompt. Lower keeps more.
        spread: Of ``"mass"``: standard deviations, of the scores that a pool's keys have, by which a pool is judged above
            the score of its mean. 0 judges by the mean. Higher keeps more: raise ``share`` with it.
        query_pool: Of ``"mass"``: queries that are averaged to one.
        key_pool: Of ``"mass"``: keys that are averaged to one.
        head_factors: Of ``"mass"``: what ``share`` is multiplied by: a row for each layer of a model (or a single one, for all
            of them), in it a number for each query head. ``stem-attention calibrate`` finds them. A call of one layer takes
            :meth:`for_layer`.
        stride: Stride ``s`` of the antidiagonal pooling of the routing score.
        beta: Weight of the value magnitude in the block score. 0 is the score-aware metric of earlier methods.
        magnitude: ``"log"``: largest ``max(0, ln |v|)`` of the block. ``"zscore"``: the public code's normalised
            variant; it looks at the whole sequence, so it is *not* chunk-invariant. ``"none"``: no value term.
        decay: ``mu``, the share of the first row's budget that is left for the last row. 1 is uniform top-k.
        schedule: First row's budget against prompt length. ``"smooth"``: the two ratios joined without a jump.
            ``"step"``: the paper's jump at the knee. ``"angelslim"``: the public code's flat-then-falling schedule.
        ratio_short: Share of the blocks kept by the first rows of prompts up to ``knee_tokens``.
        ratio_long: The same for prompts far beyond the knee. At most ``ratio_short``.
        knee_tokens: Prompt length, in tokens, at which the ratio starts to fall.
        min_blocks: Smallest first-row budget in blocks. ``None`` means ``sink_blocks + local_blocks``.
        sink_blocks: Blocks at the start of the prompt that every row keeps.
        local_blocks: Blocks up to and including the diagonal that every row keeps. At least 1.
        tail_blocks: Last query blocks of the whole prompt, where the question usually stands, that keep everything.
        forced: ``"inside"``: sink and local blocks count against the budget. ``"extra"``: they are added to the top-k.
        dense_below: Prompts of fewer tokens run dense in :func:`stem_attention.stem_attention`. ``None``: the length at
            which the backend that runs was measured to overtake dense attention.
            :func:`stem_attention.select_blocks` always selects.
        dense_layers: First layers of a model that the integrations leave dense.

    Raises:
        ValueError: A field has the wrong type or lies outside its range; the message names it.
    """

    keep: str = "budget"
    block_size: int = 128
    share: float = 4.0
    spread: float = 0.5
    query_pool: int = 16
    key_pool: int = 32
    head_factors: tuple[tuple[float, ...], ...] | None = None
    stride: int = 16
    beta: float = 0.2
    magnitude: str = "log"
    decay: float = 0.7
    schedule: str = "smooth"
    ratio_short: float = 0.2
    ratio_long: float = 0.1
    knee_tokens: int = 16384
    min_blocks: int | None = None
    sink_blocks: int = 1
    local_blocks: int = 2
    tail_blocks: int = 2
    forced: str = "inside"
    dense_below: int | None = None
    dense_layers: int = 0
    # Kept from construction on, because torch.compile can trace neither the JSON encoder nor the checks of a new config.
    _json: str = dataclasses.field(init=False, repr=False, compare=False)
    _layers: tuple[StemConfig, ...] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, least in (
            ("stride", 1),
            ("block_size", 1),
            ("query_pool", 1),
            ("key_pool", 1),
            ("knee_tokens", 1),
            ("sink_blocks", 0),
            ("local_blocks", 1),
            ("tail_blocks", 0),
            ("dense_layers", 0),
        ):
            self._check_int(name, least)
        for name, least in (("min_blocks", 1), ("dense_below", 0)):
            if getattr(self, name) is not None:
                self._check_int(name, least)
        for name in ("beta", "spread"):
            self._check_float(name, 0.0, math.inf)
        self._check_float("share", 0.0, math.inf, open_below=True)
        for name in ("decay", "ratio_short", "ratio_long"):
            self._check_float(name, 0.0, 1.0, open_below=True)
        for name, choices in (
            ("keep", KEEP_RULES),
            ("magnitude", MAGNITUDES),
            ("schedule", SCHEDULES),
            ("forced", FORCED_RULES),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise bad_argument(name, f"one of {', '.join(choices)}", repr(value), "pick one of these names")
        for name in ("stride",) if self.keep == "budget" else ("query_pool", "key_pool"):
            if self.block_size % getattr(self, name):
                raise bad_argument(
                    "block_size",
                    f"a multiple of {name}={getattr(self, name)}",
                    self.block_size,
                    f"change block_size or {name} so that one divides the other",
                )
        self._check_head_factors()
        self._check_unused()
        if self.ratio_long > self.ratio_short:
            raise bad_argument(
                "ratio_long",
                f"at most ratio_short={self.ratio_short}",
                self.ratio_long,
                "long prompts keep a smaller share than short ones; raise ratio_short too",
            )
        object.__setattr__(self, "_json", json.dumps(self.to_dict()))
        rows = self.head_factors if self.head_factors is not None and len(self.head_factors) > 1 else ()
        object.__setattr__(self, "_layers", tuple(dataclasses.replace(self, head_factors=(row,)) for row in rows))

    def _check_head_factors(self) -> None:
        """Lists, as JSON has them, become tuples of floats."""
        rows = self.head_factors
        if rows is None:
            return
        expected = "None, or a row for each layer (or one for all) of finite numbers > 0, one for each query head"
        fix = "take those that stem-attention calibrate writes"
        if not isinstance(rows, (list, tuple)) or not rows or not all(isinstance(row, (list, tuple)) and row for row in rows):
            raise bad_argument("head_factors", expected, f"{type(rows).__name__} {rows!r:.60}", fix)
        if len({len(row) for row in rows}) > 1:
            raise bad_argument("head_factors", "rows of one length", f"rows of {sorted({len(row) for row in rows})}", fix)
        for factor in (factor for row in rows for factor in row):
            number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
            if not number or not 0 < factor <= sys.float_info.max:
                raise bad_argument("head_factors", expected, repr(factor), fix)
        object.__setattr__(self, "head_factors", tuple(tuple(map(float, row)) for row in rows))

    def _check_unused(self) -> None:
        """Refuse settings of the rule that is not in force."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for rule, names in _ONLY.items():
            for name in names if rule != self.keep else ():
                if getattr(self, name) != defaults[name]:
                    fix = f"it means nothing under keep={self.keep!r}; leave it out, or take keep={rule!r}"
                    raise bad_argument(name, f"its default, {defaults[name]!r}", repr(getattr(self, name)), fix)

    def _check_int(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise bad_argument(name, f"an integer >= {least}", repr(value), f"pass {name}={max(least, 1)} or more")

    def _check_float(self, name: str, low: float, high: float, open_below: bool = False) -> None:
        value = getattr(self, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        if not number or value > high or value < low or (open_below and value == low):
            span = f"a finite number {'>' if open_below else '>='} {low:g}" + ("" if high == math.inf else f" and <= {high:g}")
            raise bad_argument(name, span, repr(value), f"pass a {name} in that range")
        object.__setattr__(self, name, float(value))

    @classmethod
    def paper(cls, **changes: Any) -> StemConfig:
        """The published method: ratio 0.2 up to 16384 tokens and 0.1 beyond, 4 + 4 forced blocks, no dense tail.

        ``changes`` override.
        """
        return cls(**{**_PUBLISHED, "schedule": "step", **changes})

    @classmethod
    def angelslim(cls, **changes: Any) -> StemConfig:
        """The authors' public code (Tencent AngelSlim) as it runs. ``changes`` override.

        Its knee lies at 160 blocks of 128 tokens. Its z-score magnitude is not chunk-invariant.
        """
        preset: dict[str, Any] = {
            **_PUBLISHED,
            "schedule": "angelslim",
            "magnitude": "zscore",
            "forced": "extra",
            "stride": 8,
            "knee_tokens": 160 * 128,
            "dense_layers": 2,
        }
        return cls(**{**preset, **changes})

    @classmethod
    def mass(cls, **changes: Any) -> StemConfig:
        """Keep by mass, in blocks of 64: as accurate at half the density (docs/mass.md). ``changes`` override."""
        return cls(**{"keep": "mass", "block_size": 64, **changes})

    def for_layer(self, layer: int, heads: slice = slice(None)) -> StemConfig:
        """What a call of one layer takes: this config, with the layer's row of ``head_factors`` alone.

        Args:
            layer: Its place in the model, from 0.
            heads: Those of its query heads that the call has: a rank of tensor parallelism has a part of them.

        Raises:
            ValueError: ``head_factors`` has no such layer, or no factor for these heads.
        """
        if self.head_factors is None:
            return self
        rows = len(self.head_factors)
        if rows > 1 and not 0 <= layer < rows:
            raise bad_argument("layer", f"one of the {rows} layers of head_factors", layer, "calibrate for this model")
        own = self._layers[layer] if rows > 1 else self
        if heads == slice(None):
            return own
        factors = self.head_factors[layer if rows > 1 else 0][heads]
        return dataclasses.replace(own, head_factors=(factors,))

    def head_share(self, head: int) -> float:
        """``share`` times the factor of a query head of the one layer that this config is for."""
        return self.share * (self.head_factors[0][head] if self.head_factors is not None else 1.0)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON types."""
        return {name: getattr(self, name) for name in _field_names(type(self))}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> StemConfig:
        """Build from :meth:`to_dict`'s output; absent fields take their defaults.

        Raises:
            ValueError: ``fields`` is no mapping, names an unknown field, or holds a bad value.
        """
        if not isinstance(fields, Mapping):
            raise bad_argument("fields", "a mapping of StemConfig fields", type(fields).__name__, "pass a dict")
        known = _field_names(cls)
        unknown = sorted(str(name) for name in set(fields) - set(known))
        if unknown:
            raise bad_argument("fields", f"names among {', '.join(known)}", ", ".join(unknown), "remove or correct them")
        return cls(**fields)

    def to_json(self) -> str:
        """The config as a JSON object; :meth:`from_json` reads it back equal."""
        return self._json

    @classmethod
    def from_json(cls, text: str) -> StemConfig:
        """Read :meth:`to_json`'s output.

        Raises:
            ValueError: ``text`` is not a JSON object of StemConfig fields.
        """
        expected = "a JSON object of StemConfig fields"
        if not isinstance(text, str):
            raise bad_argument("text", expected, type(text).__name__, "pass a string")
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError: no JSON, or a number of too many digits
            raise bad_argument("text", expected, f"invalid JSON ({error})", "fix the JSON") from None
        return cls.from_dict(fields)


def _field_names(cls: type[StemConfig]) -> list[str]:
    return [field.name for field in dataclasses.fields(cls) if field.init]
