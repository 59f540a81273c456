"""Uniform top-k by score: what earlier methods do, and what Stem's paper ablates against."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from stem_attention.config import StemConfig
from stem_attention.errors import bad_argument
from stem_attention.policies.base import check_is_config
from stem_attention.policies.stem import Stem
from stem_attention.selection import BlockSelection


@dataclass(frozen=True)
class UniformTopK:
    """Stem without its two ideas: every row has the same budget, and values do not count.

    That is Stem with ``decay=1``, ``beta=0`` and ``tail_blocks=0``; see :class:`stem_attention.policies.Policy` for the call.

    Attributes:
        config: Everything else, read as by :class:`stem_attention.policies.Stem`.
        scaling: Factor on ``ratio_short`` and ``ratio_long``. ``(1 + decay) / 2``, 0.85 for Stem's default, asks for about
            the compute of Stem, as in the paper's ablation. The ``angelslim`` schedule has a constant part that it would
            not scale, and takes just 1.
    """

    name: ClassVar[str] = "uniform"

    config: StemConfig = field(default_factory=StemConfig)
    scaling: float = 1.0

    def __post_init__(self) -> None:
        check_is_config(self.config)
        number = isinstance(self.scaling, (int, float)) and not isinstance(self.scaling, bool)
        most = 1 / self.config.ratio_short
        if not number or not 0 < self.scaling <= most:
            span = f"a number > 0 and <= {most:g}, 1 / ratio_short"
            raise bad_argument("scaling", span, repr(self.scaling), "0.85 equals the compute of Stem's default")
        if self.config.schedule == "angelslim" and self.scaling != 1:
            raise bad_argument("scaling", "1 with the angelslim schedule", self.scaling, "use the step or smooth schedule")

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, prompt_len: int | None = None
    ) -> BlockSelection:
        return self.as_stem()(q, k, v, scale=scale, prompt_len=prompt_len)

    def as_stem(self) -> Stem:
        """The same policy spelt as Stem."""
        short, long = (min(ratio * self.scaling, 1.0) for ratio in (self.config.ratio_short, self.config.ratio_long))
        return Stem(replace(self.config, decay=1.0, beta=0.0, tail_blocks=0, ratio_short=short, ratio_long=long))
