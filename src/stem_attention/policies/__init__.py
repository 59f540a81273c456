"""Which key blocks to keep: Stem and the policies it is compared with."""

from stem_attention.policies.base import Policy
from stem_attention.policies.bigbird import BigBird
from stem_attention.policies.dense import Dense
from stem_attention.policies.longformer import Longformer
from stem_attention.policies.registry import make_policy, policy_names
from stem_attention.policies.sink_window import SinkWindow
from stem_attention.policies.stem import Stem
from stem_attention.policies.strided import Strided
from stem_attention.policies.uniform import UniformTopK
from stem_attention.policies.xattention import XAttention

__all__ = [
    "BigBird",
    "Dense",
    "Longformer",
    "Policy",
    "SinkWindow",
    "Stem",
    "Strided",
    "UniformTopK",
    "XAttention",
    "make_policy",
    "policy_names",
]
