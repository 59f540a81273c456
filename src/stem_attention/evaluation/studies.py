"""Named sets of contenders, each the answer to one question."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from stem_attention.errors import bad_argument
from stem_attention.evaluation.contenders import Contender, Value, parse_contender

DENSITIES = (0.1, 0.15, 0.2, 0.3, 0.4)
PARETO = (
    "stem", "uniform", "sink-window", "strided", "longformer", "bigbird", "xattention-topk", "flashprefill-topk", "oracle"
)  # fmt: skip
THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95)
"""XAttention's own knob: what density it comes to is measured, not asked for."""
SHARES = (2, 4, 8, 16)
"""Those of keep by mass, likewise."""

BASE = "base"
_BASE = (("tail_blocks", 0),)
"""The ablation's base is Stem's default without the dense tail, which would hide in part what is changed."""

_SWEEPS: dict[str, tuple[Value, ...]] = {
    "decay": (1.0, 0.85, 0.6, 0.5, 0.3),
    "beta": (0.0, 0.1, 0.3, 0.5, 1.0),
    "stride": (8, 32),
    "block_size": (64,),
    "magnitude": ("none", "zscore"),
    "sink_blocks": (0, 2, 4),
    "local_blocks": (1, 4, 8),
    "tail_blocks": (1, 2, 4),
    "dense_layers": (2,),
}
"""Values that differ from the base's own, field by field."""

# The first quarter's own budget bites only when it is small: 1/32 of all blocks is 23 % of what its rows see. Fewer forced
# blocks and blocks of 64 leave the policy room to choose.
_CONFINED = (
    ("block_size", 64), ("sink_blocks", 1), ("local_blocks", 1), ("tail_blocks", 0), ("decay", 1.0),
    ("ratio_short", 1 / 32), ("ratio_long", 1 / 32),
)  # fmt: skip
_EARLY, _LATE = (0.0, 0.25), (0.75, 1.0)


def study(name: str) -> list[Contender]:
    """The contenders of a study, dense first.

    Not every one can be built at every length: see :meth:`Contender.is_reachable`.

    Raises:
        ValueError: There is no such study.
    """
    if name not in STUDIES:
        raise bad_argument("study", f"one of {', '.join(STUDIES)}", repr(name), "pick one of these names")
    return [parse_contender("dense"), *STUDIES[name]()]


def ablation() -> list[Contender]:
    """What every part of the method is worth: one change from one base."""
    base = Contender(BASE, "stem", _BASE)
    uniform = _changed(base, "decay=1 at equal compute", decay=1.0, ratio_short=0.2 * 0.85, ratio_long=0.1 * 0.85)
    changed = [_changed(base, f"{field}={value}", **{field: value}) for field in _SWEEPS for value in _SWEEPS[field]]
    return [base, uniform, *changed]


def pareto(block_size: int = 128) -> list[Contender]:
    """Accuracy against density, for every policy."""
    size = "" if block_size == 128 else f"block_size={block_size}"
    colon, comma = (":", ",") if size else ("", "")
    tuned = [parse_contender(f"{name}{colon}{size}@{density}") for name in PARETO for density in DENSITIES]
    by_threshold = [f"xattention:threshold={threshold}{comma}{size}" for threshold in THRESHOLDS]
    by_mass = [f"mass:share={share}" for share in SHARES]  # its blocks are of 64 in either
    return [*tuned, *map(parse_contender, by_threshold + by_mass)]


def pareto64() -> list[Contender]:
    """The same with blocks of 64 tokens, of which forced ones take half as much: short prompts reach low densities."""
    return pareto(64)


def equal() -> list[Contender]:
    """Every policy at the density of Stem's default; XAttention's threshold as published, and mass at its default."""
    others = [parse_contender(f"{name}@stem") for name in PARETO if name != "stem"]
    return [parse_contender("stem"), parse_contender("paper"), *others, parse_contender("xattention"), parse_contender("mass")]


def table1() -> list[Contender]:
    """The paper's Table 1: with the values' magnitude (OAM) against without (SAM), at equal budget."""
    return [parse_contender(f"{name}{change}") for name in ("paper", "stem") for change in ("", ":beta=0", ":magnitude=zscore")]


def figure3() -> list[Contender]:
    """The paper's Fig. 3: what sparse attention costs in the first quarter of the rows, and in the last.

    ``late`` has the density of ``early`` in its own rows and so drops seven times as many block pairs; ``late, equal drops``
    drops as many as ``early``.
    """
    contenders = []
    for family in ("stem", "oracle"):
        early = Contender(f"{family}: early", family, _CONFINED, rows=_EARLY)
        open_size = tuple(setting for setting in _CONFINED if not setting[0].startswith("ratio"))
        late = Contender(f"{family}: late", family, open_size, early, _LATE)
        contenders += [early, late, replace(late, name=f"{family}: late, equal drops", target=0.89)]
    return contenders


STUDIES: dict[str, Callable[[], list[Contender]]] = {
    study.__name__: study for study in (ablation, pareto, pareto64, equal, table1, figure3)
}


def _changed(base: Contender, name: str, **fields: Value) -> Contender:
    return replace(base, name=name, settings=tuple({**dict(base.settings), **fields}.items()))
