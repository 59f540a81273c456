"""Policies as text: ``mass:share=8`` on the command line, a JSON object in files and in what hosts store.

    NAME[:FIELD=VALUE,...][@DENSITY]

``NAME`` is a preset or a policy of the library, the path of a JSON file that holds one, or ``module:Class`` for a policy of
one's own. ``@DENSITY`` tunes the policy's size for one prompt length, to a number or to the density of another policy:
``sink-window@0.18``, ``uniform@stem``.
"""

import dataclasses
import json
import re
import sys
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from stem_attention.blocks import block_count
from stem_attention.checks import check_flag
from stem_attention.errors import bad_argument, nearest
from stem_attention.policies.base import Policy, check_policy, is_number
from stem_attention.policies.mass import Mass
from stem_attention.policies.oracle import Oracle
from stem_attention.policies.patterns import BigBird, Dense, Longformer, SinkWindow, Strided
from stem_attention.policies.rivals import FlashPrefillTopK, XAttention, XAttentionTopK
from stem_attention.policies.stem import Stem

TOLERANCE = 0.05
"""How far a tuned density may lie from its target, relative to it."""

_CLASSES: tuple[type[Policy], ...] = (
    Mass, Stem, Dense, SinkWindow, Strided, Longformer, BigBird, XAttention, XAttentionTopK, FlashPrefillTopK, Oracle
)  # fmt: skip
_PRESETS: dict[str, Callable[..., Policy]] = {"paper": Stem.paper, "angelslim": Stem.angelslim, "uniform": Stem.uniform}
_NAMED: dict[str, Callable[..., Policy]] = {**{cls.name: cls for cls in _CLASSES}, **_PRESETS}
_DEFAULT = Mass()


class UnreachableDensityError(ValueError):
    """No size of a policy has the density asked for at that length: forced blocks are too many, or blocks too coarse."""


@dataclass(frozen=True)
class PolicySpec:
    """A policy as it was asked for.

    Attributes:
        text: The spec.
        policy: The policy, its size not yet tuned.
        density: What the size is tuned to: a density, or a policy whose density is to be met; None leaves it as it is.
    """

    text: str
    policy: Policy
    density: "float | PolicySpec | None" = None

    def at(self, tokens: int) -> Policy:
        """Return the policy for a prompt of ``tokens`` tokens; UnreachableDensityError where no size comes within 5 %."""
        return self.policy if self.density is None else _tuned(self, tokens)


def policy_names() -> tuple[str, ...]:
    """List the names of presets and policies that a spec may begin with."""
    return tuple(_NAMED)


def parse_spec(text: str) -> PolicySpec:
    """Read ``NAME[:FIELD=VALUE,...][@DENSITY]``; the ValueError for another form or name says what there is."""
    if not isinstance(text, str):
        raise bad_argument("policy", "a spec such as mass:share=8", type(text).__name__, "pass a string")
    text = text.strip()
    found = re.match(r"(.+\.json)(?=$|[:@])", text)  # a path may hold : and @
    file = found.group() if found and re.split("[:@]", text)[0].strip() not in _NAMED else ""
    listed, at, density = text.removeprefix(file).partition("@")
    name, _, listed = listed.strip().partition(":")
    if not file and name not in _NAMED and listed and "=" not in listed.partition(":")[0]:  # as in module:Class
        cls, _, listed = listed.partition(":")
        name = f"{name}:{cls}"
    given = _settings(listed)
    policy = policy_from_dict({**_file(file), **given}) if file else _build(name, given)
    if not at:
        return PolicySpec(text, policy)
    value = _value(density)
    if is_number(value) and not 0 < value <= 1:
        raise bad_argument("policy", "a density > 0 and <= 1 after the @", density, "0.2 keeps a fifth of the causal blocks")
    target = float(value) if is_number(value) else parse_spec(density)
    small, large = (policy.resized(*size).to_dict() for size in ((1, 64, 1.0), (32, 64, 0.1)))
    both = [name for name in given if small[name] != large[name]]
    if both:
        raise bad_argument("policy", "settings that leave the size open", ", ".join(both), "give the size or the density")
    return PolicySpec(text, policy, target)


def read_policy(value: Policy | str | None = None) -> Policy:
    """Return the policy that an argument means: itself, a spec's, or ``Mass()`` for None.

    A ValueError where it is neither, where a spec asks for a density, which takes a prompt's length, or where torch.compile
    meets a spec, which is to be read before.
    """
    if value is None:
        return _DEFAULT
    if not isinstance(value, str):
        return check_policy(value)
    if torch.compiler.is_dynamo_compiling():  # which traces no parser
        fix = "read it before: policy = stem_attention.policies.read_policy(spec)"
        raise bad_argument("policy", "a policy inside torch.compile", f"the spec {value!r}", fix)
    return _sized(value) if ".json" in value else _read_name(value)  # a file may change, a name does not


def policy_from_dict(fields: Mapping[str, Any], *, trusted: bool = True) -> Policy:
    """Build a policy from :meth:`Policy.to_dict`'s output; absent fields take their defaults.

    ``fields`` has the policy's name under ``"policy"``; a ValueError says what is wrong with it. Of a file from somebody else,
    pass ``trusted=False``: then the class of a ``module:Class`` must have been imported already.
    """
    check_flag("trusted", trusted)
    fix = 'write it as {"policy": "mass", "share": 8}'
    if not isinstance(fields, Mapping):
        raise bad_argument("policy", "a mapping with the policy's name and fields", type(fields).__name__, fix)
    name, given = fields.get("policy"), {key: value for key, value in fields.items() if key != "policy"}
    if not isinstance(name, str):
        raise bad_argument("policy", 'a name under the key "policy"', repr(name), fix)
    return _build(name, given, trusted)


def policy_from_json(text: str) -> Policy:
    """Read :meth:`Policy.to_json`'s output; a ValueError where it is no JSON object that describes a policy."""
    expected = "a JSON object of a policy's name and fields"
    if not isinstance(text, str):
        raise bad_argument("policy", expected, type(text).__name__, "pass a string")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, or a number of too many digits
        raise bad_argument("policy", expected, f"invalid JSON ({error})", "fix the JSON") from None
    return policy_from_dict(fields)


def _sized(text: str) -> Policy:
    spec = parse_spec(text)
    if spec.density is not None:
        fix = "give the size instead; run, inspect, bench and eval, which know the prompt's length, tune it"
        raise bad_argument("policy", "a spec without @DENSITY", repr(text), fix)
    return spec.policy


_read_name = lru_cache(maxsize=256)(_sized)


def _build(name: str, given: Mapping[str, Any], trusted: bool = True) -> Policy:
    own = name.partition(":")[0]
    if own in _NAMED and own != name:
        fix = f'write the fields beside it: {{"policy": "{own}", ...}}'
        raise bad_argument("policy", "a name without fields", repr(name), fix)
    make = _imported(name, trusted) if ":" in name else _NAMED.get(name)
    if make is None:
        fix = nearest(name, _NAMED, "name one of these, a .json file, or module:Class")
        raise bad_argument("policy", f"one of {', '.join(_NAMED)}", repr(name), fix)
    cls: Any = getattr(make, "__self__", make)  # a preset is a method of its class
    known = [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else given
    for field in given:
        if field not in known:
            fix = nearest(str(field), known, "remove or correct it")
            raise bad_argument("policy", f"fields of {name} among {', '.join(known) or 'none'}", repr(field), fix)
    try:
        return check_policy(make(**given))
    except TypeError as error:  # a policy of someone's own may take what it wants
        raise bad_argument("policy", f"fields that {name} takes", str(error), "remove or correct them") from None


def _imported(name: str, trusted: bool) -> Callable[..., Policy]:
    module, _, path = name.partition(":")
    fix = "name a subclass of stem_attention.Policy, not one inside a function, that Python can import from where this runs"
    if not trusted and module not in sys.modules:
        own = f"import {module} yourself before, if you trust it: a file of somebody else's must not run Python"
        raise bad_argument("policy", "a policy of the library, or of a module that is imported", repr(name), own)
    try:
        found: Any = import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # TypeError: a relative name
        raise bad_argument("policy", "module:Class", f"{name!r} ({error})", fix) from None
    if not isinstance(found, type) or not issubclass(found, Policy):
        raise bad_argument("policy", "module:Class of a policy", repr(name), fix)
    return found


def _file(path: str) -> dict[str, Any]:
    try:
        return {**json.loads(Path(path).expanduser().read_text(encoding="utf-8-sig"))}  # no shell sees a server's settings
    except (OSError, ValueError, RuntimeError, TypeError) as error:  # TypeError: no object; RuntimeError: too deep
        fix = "name a JSON file of a policy, such as stem-attention calibrate writes"
        raise bad_argument("policy", "a readable JSON file", f"{path!r} ({error})", fix) from None


def _settings(listed: str) -> dict[str, Any]:
    settings = {}
    for part in filter(None, map(str.strip, listed.split(","))):
        name, equals, text = (piece.strip() for piece in part.partition("="))
        value = _value(text)
        if not equals or not name or isinstance(value, (list, dict)):
            raise bad_argument("policy", "FIELD=VALUE settings after the colon", repr(part), "write it as mass:share=8")
        settings[name] = value
    return settings


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text  # names such as ``log`` need no quotes


@lru_cache(maxsize=1024)  # every case of a length asks again
def _tuned(spec: PolicySpec, tokens: int) -> Policy:
    policy, target = spec.policy, spec.density
    if isinstance(target, PolicySpec):
        target = target.at(tokens).density(tokens)
    if target is None or policy.density(tokens) is None:
        fix = "name a policy with a budget or a window"
        raise bad_argument("policy", "densities that are known without data", spec.text, fix)
    blocks = block_count(tokens, policy.block_size)

    def density(size: int) -> float:
        return policy.resized(size, blocks, target).density(tokens) or 0.0

    # The smallest size that reaches the target, or the one before it.
    reaches = bisect_left(range(1, blocks), target, key=density) + 1
    best = min((max(reaches - 1, 1), reaches), key=lambda size: abs(density(size) - target))
    nearest = density(best)
    if abs(nearest / target - 1) > TOLERANCE:
        raise UnreachableDensityError(
            f"{spec.text}: no density within {TOLERANCE:.0%} of {target:.3f} at {tokens} tokens, the nearest is "
            f"{nearest:.3f}; ask for another density, a longer prompt or fewer forced blocks"
        )
    return policy.resized(best, blocks, target)
