"""Which key blocks to keep: Stem and the policies it is compared with."""

from stem_attention.policies.base import Policy
from stem_attention.policies.stem import Stem

__all__ = ["Policy", "Stem"]
