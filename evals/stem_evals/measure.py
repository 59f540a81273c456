"""An evaluation: a measure has cases, every contender runs every case, and each run leaves a record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Protocol, TypeAlias

from stem_attention.models.prefill import Reading
from stem_attention.policies import Policy

Record: TypeAlias = dict[str, Any]
"""Plain JSON types. The runner adds ``measure``, ``case``, ``tokens`` and ``contender`` to what a measure returns."""


@dataclass(frozen=True)
class Case:
    """One thing to run.

    Attributes:
        key: Unique in its measure and the same in every run of the same settings; a resumed run skips it by this name.
        tokens: Prompt length, for which contenders are built.
        about: Facts about the case that its record repeats, such as the depth of a needle.
    """

    key: str
    tokens: int
    about: Record = field(default_factory=dict)


class Measure(Protocol):
    """Something to measure about a model that reads long prompts."""

    @property
    def name(self) -> str:
        """As on the command line."""
        ...

    @property
    def settings(self) -> Record:
        """Describe what the keys of its cases do not say, as plain JSON types."""
        ...

    def cases(self) -> Sequence[Case]:
        """All cases, in the order in which they run; every contender runs a case before the next one starts, dense first."""
        ...

    def run(self, case: Case, policy: Policy | None) -> Record:
        """Run one case; a record holds at least ``density`` and ``seconds``.

        Args:
            case: One of :meth:`cases`.
            policy: What to prefill with; None for the host's own dense attention.
        """
        ...


def of_prefill(reading: Reading) -> Record:
    """Describe what every record says of its prefill.

    Returns:
        ``density``: kept share of the causal block pairs, averaged over layers, 1 for a layer that ran dense;
        ``sparse_share``: share of the layers that ran sparse; ``seconds``: time to first token.
    """
    sparse = [float(call.sparse) for call in reading.calls]
    return {"density": reading.density, "sparse_share": fmean(sparse) if sparse else 0.0, "seconds": reading.seconds}
