"""What Stem is asked to do in vLLM: read from the environment or from vLLM's own ``--additional-config``, checked once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stem_attention.checks import check_backend
from stem_attention.config import StemConfig
from stem_attention.errors import bad_argument

ENVIRONMENT = "STEM_ATTENTION_CONFIG"
ADDITIONAL_CONFIG = "stem_attention"
MIN_QUERY_LEN = 256

_PRESETS: dict[str, Callable[..., StemConfig]] = {
    "default": StemConfig,
    "paper": StemConfig.paper,
    "angelslim": StemConfig.angelslim,
    "mass": StemConfig.mass,
}


@dataclass(frozen=True)
class Settings:
    """What the plug-in does.

    Attributes:
        config: What to keep.
        min_query_len: Fewest tokens of a prompt in one step that are worth a sparse call; at least 2.
        backend: As in :func:`stem_attention.stem_attention`.
        source: Where the settings came from, for the log.
    """

    config: StemConfig
    min_query_len: int = MIN_QUERY_LEN
    backend: str = "auto"
    source: str = "the defaults"

    def __post_init__(self) -> None:
        if not isinstance(self.min_query_len, int) or isinstance(self.min_query_len, bool) or self.min_query_len < 2:
            raise bad_argument("min_query_len", "an integer >= 2", repr(self.min_query_len), "1 is a decode step")
        check_backend(self.backend)

    def __str__(self) -> str:
        """What a log says of them; of ``head_factors`` only how many there are."""
        fields = self.config.to_dict()
        factors = fields.pop("head_factors")
        count = "" if factors is None else f" and head_factors of {len(factors)} x {len(factors[0])}"
        return f"settings from {self.source}: {json.dumps(fields)}{count}"


def check_head_factors(config: StemConfig, layers: int, heads: int) -> None:
    """Refuse ``head_factors`` of another model.

    Args:
        config: Any config.
        layers: How many the model has.
        heads: Query heads of its layers, those of all ranks together.

    Raises:
        ValueError: There are others; the message says how many.
    """
    if config.head_factors is None:
        return
    rows, width = len(config.head_factors), len(config.head_factors[0])
    if rows not in (1, layers) or width != heads:
        expected = f"{layers} x {heads} of them (layers x query heads of this model), or 1 x {heads} for every layer"
        raise bad_argument("head_factors", expected, f"{rows} x {width}", "run stem-attention calibrate on this model")


def read_settings(additional_config: object = None) -> Settings:
    """Settings of this process.

    They are a JSON object of :class:`StemConfig` fields, beside ``preset`` (``"default"``, ``"paper"``, ``"angelslim"`` or
    ``"mass"``, which the other fields change), ``min_query_len`` and ``backend``: under ``"stem_attention"`` in
    ``additional_config``, or in the environment variable ``STEM_ATTENTION_CONFIG``, which holds the object itself or the path
    of a file with it.

    Args:
        additional_config: vLLM's ``additional_config``; anything but a mapping says nothing about Stem.

    Raises:
        ValueError: Both places speak, or the JSON or a field is bad; the message names the place and the field.
    """
    given = additional_config.get(ADDITIONAL_CONFIG) if isinstance(additional_config, Mapping) else None
    text = os.environ.get(ENVIRONMENT, "").strip()
    if text and given is not None:
        expected = f"nothing while --additional-config has {ADDITIONAL_CONFIG!r}"
        raise bad_argument(ENVIRONMENT, expected, text, "keep one of the two")
    if given is not None:
        return _settings(f"--additional-config {ADDITIONAL_CONFIG}", given)
    return _settings(ENVIRONMENT, _json(text)) if text else Settings(StemConfig())


def _json(text: str) -> object:
    if not text.startswith("{"):
        try:
            text = Path(text).read_text(encoding="utf-8")
        except OSError as error:
            expected = "a JSON object or the path of a file with one"
            raise bad_argument(ENVIRONMENT, expected, f"{text!r} ({error.strerror})", "correct the path") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise bad_argument(ENVIRONMENT, "a JSON object", f"invalid JSON ({error})", "fix the JSON") from None


def _settings(source: str, given: object) -> Settings:
    if not isinstance(given, Mapping):
        raise bad_argument(source, "a JSON object", repr(given), 'write it as {"decay": 0.8}')
    fields: dict[str, Any] = dict(given)
    options = {name: fields.pop(name) for name in ("min_query_len", "backend") if name in fields}
    preset = fields.pop("preset", "default")
    known = StemConfig().to_dict()
    unknown = sorted(str(name) for name in set(fields) - set(known))
    try:
        if unknown:
            names = ", ".join(("preset", "min_query_len", "backend", *known))
            raise bad_argument("fields", f"names among {names}", ", ".join(unknown), "remove or correct them")
        if not isinstance(preset, str) or preset not in _PRESETS:
            raise bad_argument("preset", f"one of {', '.join(_PRESETS)}", repr(preset), "pick one of these names")
        return Settings(_PRESETS[preset](**fields), source=source, **options)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
