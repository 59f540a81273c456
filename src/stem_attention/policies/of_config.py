"""The policy that a config describes."""

from __future__ import annotations

from stem_attention.config import StemConfig
from stem_attention.policies.base import check_is_config
from stem_attention.policies.mass import Mass
from stem_attention.policies.stem import Stem


def policy_of(config: StemConfig) -> Stem | Mass:
    """:class:`Stem` or :class:`Mass`, as ``config.keep`` says."""
    check_is_config(config)
    return Mass(config) if config.keep == "mass" else Stem(config)
