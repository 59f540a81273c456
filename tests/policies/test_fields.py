"""Fields of the policies: the least that each takes, the whole message when it is not met, and what depends on the call."""

import dataclasses
import re

import pytest
import torch

from stem_attention import StemConfig, policies
from stem_attention.policies import Longformer, Stem, UniformTopK, XAttention, make_policy, policy_names
from stem_attention.testing import make_qkv

LEAST = {
    "block_size": 1, "window_blocks": 1, "stride_blocks": 1, "stride": 1, "sink_blocks": 0, "global_blocks": 0,
    "tail_blocks": 0, "random_blocks": 0, "seed": 0,
}  # fmt: skip
CLASSES = [item for item in vars(policies).values() if dataclasses.is_dataclass(item)]
COUNTS = [(cls, field.name) for cls in CLASSES for field in dataclasses.fields(cls) if field.type == "int"]
CONFIG = StemConfig(block_size=16, stride=4, tail_blocks=1, sink_blocks=1, local_blocks=1, min_blocks=2)


def whole(*parts):
    """The message, from its first letter to its last."""
    return f"^{re.escape('; '.join(parts))}$"


@pytest.mark.parametrize(("cls", "name"), COUNTS)
def test_every_count_takes_its_least_and_refuses_one_less(cls, name):
    least = LEAST[name]
    others = {"stride": 1} if name == "block_size" and cls is XAttention else {}
    assert getattr(cls(**{name: least, **others}), name) == least
    said = whole(f"{name}: expected an integer >= {least}, got {least - 1}", f"pass {name}={max(least, 1)} or more")
    with pytest.raises(ValueError, match=said):
        cls(**{name: least - 1})


def test_messages_are_whole_sentences():
    with pytest.raises(ValueError, match=whole("threshold: expected a number > 0 and <= 1, got 1.5", "the paper uses 0.9")):
        XAttention(threshold=1.5)
    fix = "change block_size or stride so that one divides the other"
    with pytest.raises(ValueError, match=whole("block_size: expected a multiple of stride=24, got 128", fix)):
        XAttention(stride=24)
    span = "scaling: expected a number > 0 and <= 5, 1 / ratio_short, got 5.5"
    with pytest.raises(ValueError, match=whole(span, "0.85 equals the compute of Stem's default")):
        UniformTopK(scaling=5.5)
    with pytest.raises(
        ValueError, match=whole("scaling: expected 1 with the angelslim schedule, got 0.5", "use the step or smooth schedule")
    ):
        UniformTopK(StemConfig.angelslim(), scaling=0.5)
    with pytest.raises(ValueError, match=whole("config: expected a StemConfig, got dict", "build one with StemConfig(...)")):
        Stem({})
    names = ", ".join(policy_names())
    with pytest.raises(ValueError, match=whole(f"policy: expected one of {names}, got 'magic'", "pick one of these names")):
        make_policy("magic", CONFIG)
    known = "window_blocks, global_blocks, tail_blocks, block_size"
    said = f"options: expected {known} for policy longformer, got colour, size"
    with pytest.raises(ValueError, match=whole(said, "remove or correct them")):
        make_policy("longformer", CONFIG, size=1, colour=2)
    with pytest.raises(ValueError, match=whole("options: expected none for policy stem, got beta", "remove or correct them")):
        make_policy("stem", CONFIG, beta=1)


def test_names_are_those_of_the_classes():
    assert policy_names()[:2] == ("stem", "dense")
    assert set(policy_names()) <= {cls.name for cls in CLASSES}
    assert len(set(policy_names())) == len(policy_names()) >= 10


@pytest.mark.parametrize("name", policy_names())
def test_everything_is_made_on_the_tensors_own_device(name):
    """A default device elsewhere (here one that holds no data) must not reach inside."""
    q, k, v = make_qkv(2, 90, 500, 4, 2, 16)
    policy = make_policy(name, CONFIG)
    expected = policy(q, k, v)
    extra = make_policy(name, dataclasses.replace(CONFIG, forced="extra", magnitude="zscore"))
    with torch.device("meta"):
        selection, other = policy(q, k, v), extra(q, k, v)
    assert selection.indices.device == selection.counts.device == other.indices.device == other.counts.device == q.device
    assert torch.equal(selection.indices, expected.indices)


@pytest.mark.parametrize("name", policy_names())
def test_the_scale_is_one_over_the_root_of_the_dimension_unless_given(name):
    q, k, v = make_qkv(1, 400, 400, 2, 1, 16)
    policy = make_policy(name, CONFIG)
    assert torch.equal(policy(q, k, v).indices, policy(q, k, v, scale=0.25).indices)
    if name in ("stem", "xattention", "xattention-topk", "flashprefill-topk", "oracle"):
        assert not torch.equal(policy(q, k, v).to_mask(), policy(q, k, v, scale=4.0).to_mask())
    if name == "uniform":  # without values only the order of the scores counts
        assert not torch.equal(policy(q, k, v).to_mask(), policy(q, k, v, scale=-0.25).to_mask())


def test_the_public_codes_schedule_takes_a_scaling_of_one_alone():
    assert UniformTopK(StemConfig.angelslim()).scaling == 1
    for scaling in (0.99, 2):
        with pytest.raises(ValueError, match=r"^scaling: expected 1 with the angelslim schedule"):
            UniformTopK(StemConfig.angelslim(), scaling=scaling)


@pytest.mark.parametrize("name", ["stem", "oracle", "xattention-topk", "flashprefill-topk"])
def test_scores_come_once_for_every_row(name, monkeypatch):
    monkeypatch.setattr("stem_attention.policies.stem._ROWS_PER_CHUNK", 3)
    monkeypatch.setattr("stem_attention.policies.flashprefill._WORKSPACE", 3 * 2 * 16 * 13)
    q, k, v = make_qkv(1, 160, 200, 2, 1, 16)
    policy = make_policy(name, CONFIG)
    rows = [row + i for row, scores in policy.scores(q, k, v, 0.25, 2, 13) for i in range(scores.shape[2])]
    assert rows == list(range(2, 13))


@pytest.mark.parametrize("name", policy_names())
def test_no_queries_select_nothing(name):
    q, k, v = make_qkv(2, 0, 50, 4, 2, 16)
    selection = make_policy(name, CONFIG)(q, k, v)
    assert selection.indices.shape[:3] == selection.counts.shape == (2, 4, 0)
    assert (selection.q_len, selection.kv_len, selection.density()) == (0, 50, 1.0)


def test_the_tail_of_a_longformer_starts_where_the_prompt_says():
    q, k, v = make_qkv(1, 160, 160, 1, 1, 16)
    policy = Longformer(window_blocks=1, global_blocks=0, tail_blocks=2, block_size=16)
    assert policy(q, k, v).counts.flatten().tolist() == [1] * 8 + [9, 10]
    assert policy(q, k, v, prompt_len=161).counts.flatten().tolist() == [1] * 9 + [10]
