"""Policies by name, for the command line and for tables."""

from __future__ import annotations

import dataclasses
from typing import Any

from stem_attention.config import StemConfig
from stem_attention.errors import bad_argument
from stem_attention.policies.base import Policy, check_is_config
from stem_attention.policies.bigbird import BigBird
from stem_attention.policies.dense import Dense
from stem_attention.policies.flashprefill import FlashPrefillTopK
from stem_attention.policies.longformer import Longformer
from stem_attention.policies.mass import Mass
from stem_attention.policies.oracle import Oracle
from stem_attention.policies.sink_window import SinkWindow
from stem_attention.policies.stem import Stem
from stem_attention.policies.strided import Strided
from stem_attention.policies.uniform import UniformTopK
from stem_attention.policies.xattention import XAttention, XAttentionTopK

_CLASSES = (
    Stem, Dense, UniformTopK, SinkWindow, Strided, Longformer, BigBird, XAttention, XAttentionTopK, FlashPrefillTopK, Oracle
)  # fmt: skip
_POLICIES = {cls.name: cls for cls in _CLASSES}


def policy_names() -> tuple[str, ...]:
    """Valid names for :func:`make_policy`."""
    return tuple(_POLICIES)


def make_policy(name: str, config: StemConfig, **options: Any) -> Policy:
    """Build a policy.

    Args:
        name: One of :func:`policy_names`.
        config: What Stem keeps; from here every policy also takes the fields that it shares with ``StemConfig``, such as
            ``block_size``.
        options: The policy's own fields; they override what ``config`` says.

    Raises:
        ValueError: The name or an option is unknown (the message lists those there are), or a value is bad.
    """
    if not isinstance(name, str) or name not in _POLICIES:
        raise bad_argument("policy", f"one of {', '.join(_POLICIES)}", repr(name), "pick one of these names")
    check_is_config(config)
    policy: Any = _POLICIES[name] if name != Stem.name or config.keep == "budget" else Mass
    known = [field.name for field in dataclasses.fields(policy) if field.name not in ("name", "config")]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise bad_argument(
            "options", f"{', '.join(known) or 'none'} for policy {name}", ", ".join(unknown), "remove or correct them"
        )
    shared = {field: getattr(config, field) for field in known if hasattr(config, field)}
    if "config" in (field.name for field in dataclasses.fields(policy)):
        shared["config"] = config
    built: Policy = policy(**{**shared, **options})
    return built
