"""Fields of every policy: the least and the most that each takes, and what is said of the rest."""

import dataclasses
import math
import re
from dataclasses import replace

import pytest
import torch

from stem_attention import Mass, Stem, policies
from stem_attention.policies import XAttention, policy_names

CLASSES = [item for item in vars(policies).values() if dataclasses.is_dataclass(item) and hasattr(item, "name")]
COUNTS = {
    **dict.fromkeys(("block_size", "stride", "query_pool", "key_pool", "knee_tokens", "min_blocks"), 1),
    **dict.fromkeys(("local_blocks", "window_blocks", "stride_blocks"), 1),
    **dict.fromkeys(("sink_blocks", "global_blocks", "tail_blocks", "random_blocks", "seed"), 0),
}
# Above 0, or from 0 on, and up to what.
NUMBERS = {
    **dict.fromkeys(("decay", "ratio_short", "ratio_long", "threshold"), ("above", 1)),
    "share": ("above", None),
    **dict.fromkeys(("beta", "spread"), ("from", None)),
}
NAMES = {"schedule": ("smooth", "step", "angelslim"), "forced": ("inside", "extra"), "magnitude": ("log", "zscore", "none")}
NOT_INTEGERS = (2.0, 1.5, "4", True, math.nan, [1], torch.tensor(4))
NOT_NUMBERS = (math.nan, math.inf, -math.inf, 10**400, "0.5", None, True, [0.1], torch.tensor(0.1))
FIELDS = [(cls, field.name) for cls in CLASSES for field in dataclasses.fields(cls)]


def fields(table):
    return [pytest.param(cls, name, id=f"{cls.name}-{name}") for cls, name in FIELDS if name in table]


def refused(cls, name, value):
    """What is said of a wrong value, once it is clear that it names the field, what came, and a way out."""
    with pytest.raises(ValueError, match=rf"^{name}: expected .+, got {re.escape(repr(value))}; .+") as error:
        cls(**{name: value})
    return str(error.value)


def test_every_field_has_a_row():
    assert len(CLASSES) == 11
    assert {name for _, name in FIELDS} == {*COUNTS, *NUMBERS, *NAMES, "head_factors"}


@pytest.mark.parametrize(("cls", "name"), fields(COUNTS))
def test_counts_are_integers_from_their_least_on(cls, name):
    least = COUNTS[name]
    parts = {part: 1 for part in ("stride", "query_pool", "key_pool") if name == "block_size" and (cls, part) in FIELDS}
    assert getattr(cls(**{name: least, **parts}), name) == least
    for value in (least - 1, -1, *NOT_INTEGERS, *([None] if name != "min_blocks" else [])):
        assert f"an integer >= {least}" in refused(cls, name, value)


@pytest.mark.parametrize(("cls", "name"), fields(NUMBERS))
def test_numbers_are_finite_lie_in_their_range_and_become_floats(cls, name):
    low, high = NUMBERS[name]
    outside = [-0.1, *NOT_NUMBERS, *([0, 0.0] if low == "above" else [])]
    for value in (*outside, *([1.01] if high else [])):
        assert "a finite number >" in refused(cls, name, value)
    for value in (1, *([0] if low == "from" else [])):
        held = getattr(cls(**{name: value, **({"ratio_short": 1} if name == "ratio_long" else {})}), name)
        assert (held, type(held)) == (value, float)


@pytest.mark.parametrize(("cls", "name"), fields(NAMES))
def test_names_are_exact(cls, name):
    for value in NAMES[name]:
        assert getattr(cls(**{name: value}), name) == value
    for value in ("", "LOG", "Smooth", None, 1, ["log"]):
        assert ", ".join(NAMES[name]) in refused(cls, name, value)


@pytest.mark.parametrize(
    ("cls", "name", "given"),
    [
        (Stem, "stride", {"block_size": 128, "stride": 24}),
        (Stem, "stride", {"block_size": 64, "stride": 128}),
        (XAttention, "stride", {"block_size": 24}),
        (policies.XAttentionTopK, "stride", {"stride": 24}),
        (Mass, "key_pool", {"block_size": 48}),
        (Mass, "query_pool", {"block_size": 48, "query_pool": 32, "key_pool": 16}),
    ],
)
def test_a_block_is_a_multiple_of_its_parts(cls, name, given):
    part = given.get(name, getattr(cls(), name))
    with pytest.raises(
        ValueError, match=rf"^block_size: expected a multiple of {name}={part}, got \d+; .*block_size or {name}"
    ):
        cls(**given)


def test_long_prompts_keep_no_larger_share_than_short_ones():
    with pytest.raises(ValueError, match=r"^ratio_long: expected at most ratio_short=0\.2, got 0\.3; .*raise ratio_short"):
        Stem(ratio_long=0.3)
    assert Stem(ratio_long=0.2).ratio_long == 0.2


@pytest.mark.parametrize("cls", CLASSES)
def test_a_policy_cannot_be_changed_and_equal_ones_hash_equal(cls):
    with pytest.raises(dataclasses.FrozenInstanceError):
        cls().block_size = 64
    assert (cls(), hash(cls())) == (replace(cls()), hash(replace(cls())))
    assert replace(cls(), block_size=192) != cls()


def test_the_names_are_those_of_the_classes_and_the_presets():
    assert set(policy_names()) == {cls.name for cls in CLASSES} | {"paper", "angelslim", "uniform"}
    assert policy_names()[0] == "mass"
