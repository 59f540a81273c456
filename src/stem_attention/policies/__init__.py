"""Policies: they choose the key blocks to keep. And how they are spelt."""

from stem_attention.policies.base import Policy
from stem_attention.policies.mass import Mass
from stem_attention.policies.oracle import Oracle
from stem_attention.policies.patterns import BigBird, Dense, Longformer, SinkWindow, Strided
from stem_attention.policies.ranked import Ranked
from stem_attention.policies.rivals import FlashPrefillTopK, XAttention, XAttentionTopK
from stem_attention.policies.spec import (
    PolicySpec,
    UnreachableDensityError,
    parse_spec,
    policy_from_dict,
    policy_from_json,
    policy_names,
    read_policy,
)
from stem_attention.policies.stem import Stem

__all__ = [
    "BigBird",
    "Dense",
    "FlashPrefillTopK",
    "Longformer",
    "Mass",
    "Oracle",
    "Policy",
    "PolicySpec",
    "Ranked",
    "SinkWindow",
    "Stem",
    "Strided",
    "UnreachableDensityError",
    "XAttention",
    "XAttentionTopK",
    "parse_spec",
    "policy_from_dict",
    "policy_from_json",
    "policy_names",
    "read_policy",
]
