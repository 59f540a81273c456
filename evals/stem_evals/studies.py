"""Named sets of contenders, each the answer to one question. Not every one can be built at every length."""

from __future__ import annotations

from collections.abc import Callable

from stem_attention.policies import Policy
from stem_attention.policies.spec import PolicySpec, parse_spec
from stem_evals.contender import Contender, parse_contender
from stem_evals.row_range import RowRange

DENSITIES = (0.1, 0.15, 0.2, 0.3, 0.4)
PARETO = (
    "stem", "uniform", "sink-window", "strided", "longformer", "bigbird", "xattention-topk", "flashprefill-topk", "oracle"
)  # fmt: skip
THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95)
"""XAttention's own knob: what density it comes to is measured, not asked for."""
SHARES = (2, 4, 8, 16)
"""Those of keep by mass, likewise."""

_SWEEPS = {
    "decay": "1.0 0.85 0.6 0.5 0.3", "beta": "0.0 0.1 0.3 0.5 1.0", "stride": "8 32", "block_size": "64",
    "magnitude": "none zscore", "sink_blocks": "0 2 4", "local_blocks": "1 4 8", "tail_blocks": "1 2 4",
}  # fmt: skip
"""Values that differ from the base's own, field by field."""

# The first quarter's own budget bites only when it is small: 1/32 of all blocks is 23 % of what its rows see. Fewer forced
# blocks and blocks of 64 leave the policy room to choose.
_CONFINED = "block_size=64,sink_blocks=1,local_blocks=1,tail_blocks=0,decay=1,ratio_short=0.03125,ratio_long=0.03125"


def ablation() -> list[Contender]:
    """Describe what every part of Stem is worth: one change from one base, its default without the dense tail."""
    base = "stem:tail_blocks=0"
    changes = {f"{field}={value}": f"{base},{field}={value}" for field in _SWEEPS for value in _SWEEPS[field].split()}
    specs = {"base": base, "decay=1 at equal compute": f"{base},decay=1,ratio_short=0.17,ratio_long=0.085", **changes}
    return [Contender(name, parse_spec(spec)) for name, spec in specs.items()]


def pareto(size: str = "") -> list[Contender]:
    """Accuracy against density, for every policy."""
    tuned = [f"{name}{size and ':' + size}@{density}" for name in PARETO for density in DENSITIES]
    by_threshold = [f"xattention:threshold={threshold}{size and ',' + size}" for threshold in THRESHOLDS]
    by_mass = [f"mass:share={share}" for share in SHARES]  # its blocks are of 64 in either
    return [parse_contender(spec) for spec in tuned + by_threshold + by_mass]


def pareto64() -> list[Contender]:
    """The same with blocks of 64 tokens, of which forced ones take half as much: short prompts reach low densities."""
    return pareto("block_size=64")


def equal() -> list[Contender]:
    """Every policy at the density of Stem's default; XAttention's threshold as published, and mass at its default."""
    others = [f"{name}@stem" for name in PARETO if name != "stem"]
    return [parse_contender(spec) for spec in ["stem", "paper", *others, "xattention", "mass"]]


def table1() -> list[Contender]:
    """The paper's Table 1: with the values' magnitude (OAM) against without (SAM), at equal budget."""
    changes = ("", ":beta=0", ":magnitude=zscore")
    return [parse_contender(f"{name}{change}") for name in ("paper", "stem") for change in changes]


def figure3() -> list[Contender]:
    """The paper's Fig. 3: what sparse attention costs in the first quarter of the rows, and in the last.

    ``late`` has the density of ``early`` in its own rows and so drops seven times as many block pairs; ``late, equal drops``
    drops as many as ``early``.
    """
    contenders = []
    for family in ("stem", "oracle"):
        confined = parse_spec(f"{family}:{_CONFINED}").policy
        early = PolicySpec(family, RowRange(confined, 0.0, 0.25))
        late: Policy = RowRange(confined, 0.75, 1.0)
        contenders += [
            Contender(f"{family}: early", early),
            Contender(f"{family}: late", PolicySpec(family, late, early)),
            Contender(f"{family}: late, equal drops", PolicySpec(family, late, 0.89)),
        ]
    return contenders


STUDIES: dict[str, Callable[[], list[Contender]]] = {
    study.__name__: study for study in (ablation, pareto, pareto64, equal, table1, figure3)
}
