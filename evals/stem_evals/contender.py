"""Who takes part in an evaluation: the host's own dense attention, and policies as ``--policy SPEC`` names them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from stem_attention.policies import Policy
from stem_attention.policies.spec import PolicySpec, UnreachableDensityError, parse_spec
from stem_evals.measure import Record

DENSE = "dense"


@dataclass(frozen=True)
class Contender:
    """Something that prefills a prompt.

    Attributes:
        name: As in tables; unique in a run.
        spec: Its policy, if wanted with a density to tune it to; None is the host's own dense attention.
    """

    name: str
    spec: PolicySpec | None = None

    @property
    def family(self) -> str:
        """Describe what its spec begins with: contenders of one family are drawn as one line."""
        return DENSE if self.spec is None else re.split("[:@]", self.spec.text)[0]

    def at(self, tokens: int) -> Policy | None:
        """Describe what to prefill a prompt of ``tokens`` tokens with.

        Raises:
            UnreachableDensityError: No size of the policy comes near the density asked for.
        """
        return None if self.spec is None else self.spec.at(tokens)

    def is_reachable(self, tokens: int) -> bool:
        """Tell whether :meth:`at` can build the contender for that length."""
        try:
            self.at(tokens)
        except UnreachableDensityError:
            return False
        return True

    def describe(self, tokens: int) -> Record:
        """Everything that makes it what it is at a length, as plain JSON types; a density of None depends on the data."""
        policy = self.at(tokens)
        if policy is None:
            return {"tokens": tokens, "density": 1.0, "fields": None}
        return {"tokens": tokens, "density": policy.density(tokens), "fields": policy.to_dict()}


def parse_contender(spec: str) -> Contender:
    """Read a policy's spec (see :mod:`stem_attention.policies.spec`); the contender is called like it.

    Raises:
        ValueError: The spec is wrong.
    """
    text = spec.strip()
    return Contender(text, None if text == DENSE else parse_spec(text))
