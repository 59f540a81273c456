"""Which key blocks to keep: Stem and the policies it is compared with."""

from stem_attention.policies.base import Policy
from stem_attention.policies.bigbird import BigBird
from stem_attention.policies.dense import Dense
from stem_attention.policies.flashprefill import FlashPrefillTopK
from stem_attention.policies.longformer import Longformer
from stem_attention.policies.mass import Mass
from stem_attention.policies.of_config import policy_of
from stem_attention.policies.oracle import Oracle
from stem_attention.policies.ranked import Ranked
from stem_attention.policies.registry import make_policy, policy_names
from stem_attention.policies.sink_window import SinkWindow
from stem_attention.policies.stem import Stem
from stem_attention.policies.strided import Strided
from stem_attention.policies.uniform import UniformTopK
from stem_attention.policies.xattention import XAttention, XAttentionTopK

__all__ = [
    "BigBird",
    "Dense",
    "FlashPrefillTopK",
    "Longformer",
    "Mass",
    "Oracle",
    "Policy",
    "Ranked",
    "SinkWindow",
    "Stem",
    "Strided",
    "UniformTopK",
    "XAttention",
    "XAttentionTopK",
    "make_policy",
    "policy_names",
    "policy_of",
]
