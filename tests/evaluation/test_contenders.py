"""Contenders: specs, and sizes that meet a density."""

import json
from dataclasses import fields

import pytest
import torch

from stem_attention import StemConfig, select_blocks
from stem_attention.evaluation.contenders import (
    PRESETS,
    Contender,
    UnreachableDensityError,
    contender_names,
    parse_contender,
    parse_contenders,
)
from stem_attention.evaluation.row_range import RowRange
from stem_attention.policies import Dense, SinkWindow, Stem, UniformTopK, XAttention, policy_names

TUNED = (
    "stem", "paper", "uniform", "sink-window", "strided", "longformer", "bigbird", "xattention-topk", "flashprefill-topk",
    "oracle",
)  # fmt: skip


def measured_density(what, tokens, heads=2):
    """Of a selection made from data."""
    q, k, v = torch.randn(3, 1, tokens, heads, 4, generator=torch.Generator().manual_seed(0))
    selection = select_blocks(q, k, v, config=what) if isinstance(what, StemConfig) else what(q, k, v)
    return selection.density()


def test_every_preset_and_policy_is_a_contender():
    assert set(contender_names()) == {*PRESETS, *policy_names()}
    for name in contender_names():
        contender = parse_contender(name)
        assert contender.name == contender.family == name
        what = contender.at(8192)
        assert what is None if name == "dense" else isinstance(what, StemConfig) or what.name == name


def test_presets_run_sparse_at_any_length_and_keep_their_own_fields():
    assert parse_contender("stem").at(1000) == StemConfig(dense_below=0)
    assert parse_contender("paper").at(1000) == StemConfig.paper(dense_below=0)
    assert parse_contender("angelslim").at(1000) == StemConfig.angelslim(dense_below=0)


def test_settings_reach_the_config_the_policy_and_the_policys_config():
    assert parse_contender("stem: beta = 0 , magnitude=none").at(9) == StemConfig(dense_below=0, beta=0, magnitude="none")
    assert parse_contender("sink-window:sink_blocks=1,block_size=64").at(9) == SinkWindow(1, 12, 64)
    uniform = parse_contender("uniform:scaling=0.85,block_size=64,min_blocks=null").at(9)
    assert uniform == UniformTopK(StemConfig(dense_below=0, block_size=64), 0.85)
    assert parse_contender("xattention:threshold=0.5").at(9) == XAttention(threshold=0.5)


@pytest.mark.parametrize("family", TUNED)
@pytest.mark.parametrize("target", [0.2, 0.3, 0.5, 0.9])
def test_a_tuned_policy_keeps_its_target_within_five_percent_of_real_selections(family, target):
    contender = parse_contender(f"{family}:block_size=16@{target}")  # 128 blocks
    assert contender.density(2048) == pytest.approx(target, rel=0.05)
    assert measured_density(contender.at(2048), 2048) == pytest.approx(contender.density(2048), abs=1e-6)


@pytest.mark.parametrize("family", TUNED)
@pytest.mark.parametrize("tokens", [8192, 16384, 32768, 131072])
def test_every_policy_meets_the_density_of_stems_default(family, tokens):
    assert parse_contender(f"{family}@stem").density(tokens) == pytest.approx(parse_contender("stem").density(tokens), rel=0.05)


def test_settings_that_are_not_the_size_survive_tuning():
    tuned = parse_contender("sink-window:sink_blocks=1@0.3").at(16384)
    assert (tuned.sink_blocks, tuned.block_size) == (1, 128)
    assert parse_contender("strided:stride_blocks=3@0.5").at(16384).stride_blocks == 3
    config = parse_contender("paper:beta=0.5@0.3").at(16384)
    assert config == StemConfig.paper(dense_below=0, beta=0.5, ratio_short=config.ratio_short, ratio_long=config.ratio_long)


def test_a_density_out_of_reach_is_refused_with_the_nearest():
    contender = parse_contender("stem@0.1")
    with pytest.raises(UnreachableDensityError, match=r"stem@0.1: no density within 5% of 0.100 at 8192 tokens.* 0\.149"):
        contender.at(8192)
    assert not contender.is_reachable(8192)
    assert contender.is_reachable(32768)
    assert parse_contender("xattention").is_reachable(1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("minference", "policy: expected one of dense, stem, paper, .* got 'minference'"),
        ("", "policy: expected one of dense"),
        ("stem:beta", "policy: expected FIELD=VALUE settings after the colon, got 'beta'"),
        ("stem:beta=[1]", "policy: expected FIELD=VALUE"),
        ("stem:width=3", "fields: expected names among .* got width"),
        ("stem:beta=-1", "beta: expected a finite number"),
        ("dense:block_size=64", "settings: expected none for dense, got block_size"),
        ("strided:beta=1", "options: expected .* for policy strided, got beta"),
        ("stem@", "policy: expected one of dense"),
        ("stem@0", "density: expected a number > 0 and <= 1, got 0.0"),
        ("stem@1.2", "density: expected a number > 0"),
        ("stem@true", "policy: expected one of dense"),
        ("dense@0.5", "density: expected a policy whose size is known without data, got dense"),
        ("xattention@0.2", "density: expected a policy whose size is known without data, got xattention"),
        ("angelslim@0.3", "density: expected a policy whose size is known without data, got angelslim"),
        ("stem:ratio_short=0.3@0.2", "density: expected settings that leave the size open, got ratio_short"),
        ("uniform:scaling=0.3@0.2", "density: expected settings that leave the size open, got scaling"),
        ("sink-window:window_blocks=3@0.2", "density: expected settings that leave the size open, got window_blocks"),
    ],
)
def test_bad_specs_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_contender(spec)


def test_a_target_contender_must_have_a_budget():
    with pytest.raises(ValueError, match="a contender whose density is known without data"):
        parse_contender("stem@xattention").at(8192)


def test_specs_are_read_once_each():
    assert [contender.name for contender in parse_contenders(["stem", "dense", "stem"])] == ["stem", "dense"]


@pytest.mark.parametrize("spec", ["dense", "angelslim", "uniform@stem", "bigbird@0.3", "xattention", "oracle:beta=0@0.4"])
def test_descriptions_are_plain_json_with_every_field(spec):
    contender = parse_contender(spec)
    described = contender.describe(16384)
    assert json.loads(json.dumps(described)) == described
    what = contender.at(16384)
    if isinstance(what, StemConfig):
        assert described["fields"] == what.to_dict()
    elif what is not None:
        assert list(described["fields"]) == [field.name for field in fields(what)]
    assert described["policy"] == contender.family
    assert described["density"] == contender.density(16384)


def test_a_description_changes_with_what_it_describes():
    described = [parse_contender("stem@0.3").describe(tokens)["fields"] for tokens in (8192, 32768)]
    assert described[0] != described[1]
    rows = Contender("early", "stem", (), rows=(0.0, 0.25)).describe(8192)
    assert rows["rows"] == [0.0, 0.25]


def test_a_row_range_is_the_policy_inside_and_dense_outside():
    config = StemConfig(block_size=16, stride=4, sink_blocks=1, local_blocks=1, tail_blocks=0)
    q, k, v = torch.randn(3, 1, 320, 2, 8)
    mask = RowRange(Stem(config), (0.25, 0.5))(q, k, v).to_mask()
    everything, inner = Dense(16)(q, k, v).to_mask(), Stem(config)(q, k, v).to_mask()
    assert torch.equal(mask[:, :, 5:10], inner[:, :, 5:10])
    assert torch.equal(mask[:, :, :5], everything[:, :, :5])
    assert torch.equal(mask[:, :, 10:], everything[:, :, 10:])
    late = RowRange(Stem(config), (0.25, 0.5))(q[:, 96:], k, v, prompt_len=320).to_mask()
    assert torch.equal(late, mask[:, :, 6:])


@pytest.mark.parametrize("rows", [(0.5, 0.5), (-0.1, 1), (0.2, 1.1), (0.9, 0.1)])
def test_a_row_range_must_be_one(rows):
    with pytest.raises(ValueError, match="rows: expected 0 <= low < high <= 1"):
        RowRange(Stem(), rows)


@pytest.mark.parametrize("rows", [(0.0, 0.25), (0.75, 1.0)])
def test_a_target_is_about_the_sparse_rows_alone(rows):
    settings = (("block_size", 16), ("sink_blocks", 1), ("local_blocks", 1), ("tail_blocks", 0), ("decay", 1.0))
    contender = Contender("part", "stem", settings, 0.28, rows)
    q, k, v = torch.randn(3, 1, 2048, 1, 4)
    counts = contender.at(2048)(q, k, v).counts[0, 0].tolist()
    inside = range(round(rows[0] * 128), round(rows[1] * 128))
    share = sum(counts[row] for row in inside) / sum(row + 1 for row in inside)
    assert share == pytest.approx(0.28, rel=0.05)
    assert share == pytest.approx(contender.density(2048))
    assert all(counts[row] == row + 1 for row in range(128) if row not in inside)
