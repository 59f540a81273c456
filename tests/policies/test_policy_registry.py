"""Policies by name, and the refusal of bad fields."""

import pytest
import torch

from stem_attention import StemConfig
from stem_attention.policies import (
    BigBird,
    Dense,
    Longformer,
    SinkWindow,
    Stem,
    Strided,
    UniformTopK,
    XAttention,
    make_policy,
    policy_names,
)


@pytest.mark.parametrize("name", policy_names())
def test_make_policy_builds_every_name_with_the_configs_block_size(name):
    q, k, v = torch.randn(3, 1, 163, 2, 8)
    policy = make_policy(name, StemConfig(block_size=32))
    assert policy.name == name
    selection = policy(q, k, v)
    selection.validate()
    assert selection.block_size == 32


def test_make_policy_passes_shared_fields_and_lets_options_override():
    config = StemConfig(block_size=64, stride=8, sink_blocks=3, tail_blocks=1)
    assert make_policy("xattention", config, threshold=0.7) == XAttention(8, 0.7, 64)
    assert make_policy("sink-window", config, window_blocks=5) == SinkWindow(3, 5, 64)
    assert make_policy("sink-window", config, sink_blocks=1, block_size=16) == SinkWindow(1, 12, 16)
    assert make_policy("longformer", config) == Longformer(tail_blocks=1, block_size=64)
    assert make_policy("stem", config) == Stem(config)
    assert make_policy("uniform", config, scaling=0.85) == UniformTopK(config, 0.85)


def test_make_policy_names_what_it_knows():
    with pytest.raises(ValueError, match=r"policy: expected one of stem, dense, uniform, .*got 'minference'"):
        make_policy("minference", StemConfig())
    with pytest.raises(ValueError, match=r"options: expected .*threshold.* got top_k"):
        make_policy("xattention", StemConfig(), top_k=3)
    with pytest.raises(ValueError, match=r"options: expected none for policy stem, got beta"):
        make_policy("stem", StemConfig(), beta=0.1)


@pytest.mark.parametrize(
    ("cls", "field", "value"),
    [
        (Dense, "block_size", 0),
        (SinkWindow, "sink_blocks", -1),
        (SinkWindow, "window_blocks", 0),
        (SinkWindow, "block_size", 1.5),
        (Strided, "window_blocks", 0),
        (Strided, "stride_blocks", 0),
        (Strided, "block_size", True),
        (Longformer, "window_blocks", 0),
        (Longformer, "global_blocks", -1),
        (Longformer, "tail_blocks", "2"),
        (Longformer, "block_size", 0),
        (BigBird, "window_blocks", 0),
        (BigBird, "global_blocks", -1),
        (BigBird, "random_blocks", -1),
        (BigBird, "seed", None),
        (BigBird, "block_size", 0),
        (XAttention, "stride", 0),
        (XAttention, "block_size", 24),
        (XAttention, "threshold", 0),
        (XAttention, "threshold", 1.01),
        (XAttention, "threshold", float("nan")),
        (XAttention, "threshold", "0.9"),
        (UniformTopK, "scaling", 0),
        (UniformTopK, "scaling", float("nan")),
        (UniformTopK, "scaling", True),
        (UniformTopK, "scaling", 10**400),
    ],
)
def test_bad_values_are_named(cls, field, value):
    with pytest.raises(ValueError, match=rf"^{field}: expected .*got {value!r}"):
        cls(**{field: value})


def test_uniform_refuses_a_scaling_that_would_not_scale():
    with pytest.raises(ValueError, match="scaling: expected 1 with the angelslim schedule"):
        UniformTopK(StemConfig.angelslim(), scaling=0.85)
    with pytest.raises(ValueError, match="scaling: expected a number > 0 and <= 5, 1 / ratio_short, got 6"):
        UniformTopK(StemConfig(), scaling=6)
