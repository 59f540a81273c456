"""What an evaluation consists of: a measure has cases, every contender runs every case, and records become tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from stem_attention.config import StemConfig
from stem_attention.evaluation.prefill import Watcher
from stem_attention.policies import Policy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record: TypeAlias = dict[str, Any]
"""Plain JSON types. The runner adds ``measure``, ``case``, ``tokens`` and ``contender`` to what a measure returns."""

What: TypeAlias = StemConfig | Policy | None
"""What a prefill runs with; None is the host's own dense attention."""


@dataclass(frozen=True)
class Case:
    """One thing to run.

    Attributes:
        key: Unique in its measure and the same in every run of the same settings; a resumed run skips it by this name.
        tokens: Prompt length, for which contenders are built.
        about: Facts about the case that its record repeats, such as the depth of a needle.
        prefills: How many a run makes at most, each with one attention call per layer; for the progress bar.
    """

    key: str
    tokens: int
    about: Record = field(default_factory=dict)
    prefills: int = 1


class Measure(Protocol):
    """Something to measure about a model that reads long prompts."""

    @property
    def name(self) -> str:
        """As on the command line."""
        ...

    def cases(self) -> Sequence[Case]:
        """All cases, in the order in which they run; every contender runs a case before the next one starts, dense first."""
        ...

    def run(self, case: Case, what: What, watcher: Watcher) -> Record:
        """Run one case; a record holds at least ``density`` and ``seconds``.

        Args:
            case: One of :meth:`cases`.
            what: What to prefill with.
            watcher: To be told about every attention call, for the progress bar.
        """
        ...


@dataclass(frozen=True)
class Table:
    """A table of a report: cells are text already."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """What a measure's records come to."""

    title: str
    tables: tuple[Table, ...]
    figures: tuple[tuple[str, Figure], ...] = ()
    """File stem and picture of each."""
