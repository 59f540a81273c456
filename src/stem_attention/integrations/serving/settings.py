"""Settings of a server's plug-in: read once, from the environment or from what the server hands on, and checked."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from stem_attention.api import explain
from stem_attention.backends import Explanation
from stem_attention.backends.registry import check_known
from stem_attention.checks import check_backend, check_dense_below
from stem_attention.errors import UnsupportedError, bad_argument
from stem_attention.policies import Mass, Policy, policy_from_dict, read_policy
from stem_attention.policies.base import check_integers

ENVIRONMENT = "STEM_ATTENTION_SETTINGS"
ADDITIONAL_CONFIG = "stem_attention"


@dataclass(frozen=True)
class Settings:
    """Wishes of the user of a plug-in.

    Attributes:
        policy: What to keep, for the whole model.
        dense_below: Prompts of fewer tokens are left to the server; None: as many as the backend needs to gain.
        dense_layers: First layers of the model that are left to the server.
        min_query_len: Fewest tokens of a prompt in one step that are worth a sparse call.
        backend: As in :func:`stem_attention.stem_attention`.
        source: Where the settings came from, for the log.
    """

    policy: Policy = field(default_factory=Mass)
    dense_below: int | None = None
    dense_layers: int = 0
    min_query_len: int = 256
    backend: str = "auto"
    source: str = "the defaults"

    def __post_init__(self) -> None:
        check_dense_below(self.dense_below)
        check_integers(self, dense_layers=0, min_query_len=2)
        check_known(check_backend(self.backend))

    def __str__(self) -> str:
        """Describe them for a log; of ``head_factors``, which are thousands of numbers, say how many there are."""
        policy = self.policy.to_dict()
        factors = policy.pop("head_factors", None)
        count = f" with head_factors of {len(factors)} x {len(factors[0])}" if factors else ""
        return f"settings from {self.source}: {json.dumps(policy)}{count}"

    def explain(
        self, device: torch.device | str, dtype: torch.dtype, head_dim: int, value_dim: int | None = None
    ) -> Explanation:
        """Say which backend serves a model, and from which length on; UnsupportedError with all reasons where none does."""
        explanation = explain(
            device=device, dtype=dtype, head_dim=head_dim, value_dim=value_dim, policy=self.policy,
            dense_below=self.dense_below, backend=self.backend,
        )  # fmt: skip
        if explanation.chosen is None:
            raise UnsupportedError(f"Stem cannot run this model.\n{explanation}")
        return explanation


def read_settings(additional_config: object = None) -> Settings:
    """Read the settings of this process.

    They are a JSON object with the fields of :class:`Settings`, ``policy`` being a spec such as ``"mass:share=8"`` or an object
    such as ``{"policy": "mass", "share": 8}``, or such a spec alone. They stand under ``"stem_attention"`` in vLLM's
    ``additional_config``, if that is a mapping, or in the environment variable ``STEM_ATTENTION_SETTINGS``.

    Raises:
        ValueError: Both places speak, a name in ``additional_config`` is close to ours, or the JSON or a field is bad; the
            message names the place and the field.
    """
    names = list(additional_config) if isinstance(additional_config, Mapping) else []
    for name in names:  # other plug-ins have names there of which we know nothing
        if str(name).lower().startswith("stem") and name != ADDITIONAL_CONFIG:
            expected = f"the settings of Stem under {ADDITIONAL_CONFIG!r}"
            raise bad_argument("--additional-config", expected, repr(name), "rename it")
    given = additional_config.get(ADDITIONAL_CONFIG) if isinstance(additional_config, Mapping) else None
    text = os.environ.get(ENVIRONMENT, "").strip()
    if given is not None:
        if text:
            expected = f"nothing while --additional-config has {ADDITIONAL_CONFIG!r}"
            raise bad_argument(ENVIRONMENT, expected, text, "keep one of the two")
        return _settings(f"--additional-config {ADDITIONAL_CONFIG}", given)
    if not text:
        return Settings()
    try:
        given = json.loads(text) if text.startswith("{") else text
    except json.JSONDecodeError as error:
        raise bad_argument(ENVIRONMENT, "a JSON object", f"invalid JSON ({error})", "fix the JSON") from None
    return _settings(ENVIRONMENT, given)


def _settings(source: str, given: object) -> Settings:
    if isinstance(given, str):
        given = {"policy": given}
    if not isinstance(given, Mapping):
        raise bad_argument(source, "a JSON object or a policy's spec", repr(given), 'write it as {"policy": "mass:share=8"}')
    options: dict[str, Any] = dict(given)
    names = [field.name for field in fields(Settings) if field.name != "source"]
    try:
        if unknown := [str(name) for name in options if name not in names]:
            fix = 'a policy\'s own fields go into it: {"policy": {"policy": "mass", "share": 8}} or {"policy": "mass:share=8"}'
            raise bad_argument("settings", f"names among {', '.join(names)}", ", ".join(unknown), fix)
        policy = options.pop("policy", None)
        chosen = policy_from_dict(policy) if isinstance(policy, Mapping) else read_policy(policy)
        return Settings(chosen, source=source, **options)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
