"""Policies as text: specs, presets, JSON there and back, and sizes tuned to a density."""

import dataclasses
import inspect
import json
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fuzz.strategies import Space, policies

import stem_attention as sa
from stem_attention import Mass, Stem
from stem_attention.policies import (
    SinkWindow,
    Strided,
    UnreachableDensityError,
    XAttention,
    parse_spec,
    policy_from_dict,
    policy_from_json,
    policy_names,
    read_policy,
)

PUBLISHED = {"sink_blocks": 4, "local_blocks": 4, "tail_blocks": 0}
ANY_POLICY = st.sampled_from((16, 32, 64, 128)).flatmap(lambda block: policies(Space(), block, heads=4))


@given(ANY_POLICY)
@settings(max_examples=150)
def test_json_and_dict_round_trips_give_an_equal_policy(policy):
    for again in (policy_from_json(policy.to_json()), policy_from_dict(policy.to_dict())):
        assert (again, hash(again), again.to_json()) == (policy, hash(policy), policy.to_json())
    assert list(policy.to_dict()) == ["policy", *(field.name for field in dataclasses.fields(policy))]
    assert json.loads(policy.to_json()) == json.loads(json.dumps(policy.to_dict()))


@given(ANY_POLICY)
@settings(max_examples=100)
def test_a_spec_of_all_fields_gives_an_equal_policy(policy):
    given = {name: json.dumps(value) for name, value in policy.to_dict().items() if name not in ("policy", "head_factors")}
    spec = parse_spec(f"{policy.name}:{','.join(f'{name}={value}' for name, value in given.items())}")
    assert spec.policy == (replace(policy, head_factors=None) if isinstance(policy, Mass) else policy)
    assert (spec.density, spec.at(5000)) == (None, spec.policy)


def test_presets_hold_every_published_number():
    """What the fields of ``Stem.paper()`` come to is worked out by hand in test_ranked.py."""
    default = Stem()
    assert (default.block_size, default.stride, default.beta, default.magnitude, default.decay) == (128, 16, 0.2, "log", 0.7)
    assert (default.schedule, default.ratio_short, default.ratio_long, default.knee_tokens) == ("smooth", 0.2, 0.1, 16384)
    assert (default.sink_blocks, default.local_blocks, default.tail_blocks, default.forced) == (1, 2, 2, "inside")
    assert default.min_blocks is None
    assert Stem.paper() == Stem(schedule="step", **PUBLISHED)
    public = {"schedule": "angelslim", "magnitude": "zscore", "forced": "extra", "stride": 8, "knee_tokens": 20480}
    assert Stem.angelslim() == Stem(**public, **PUBLISHED)
    assert Stem.uniform() == Stem(decay=1, beta=0, tail_blocks=0)
    mass = Mass()
    assert (mass.share, mass.spread, mass.query_pool, mass.key_pool, mass.block_size) == (4.0, 0.5, 16, 32, 64)
    assert (mass.sink_blocks, mass.local_blocks, mass.tail_blocks, mass.head_factors) == (1, 2, 2, None)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("mass", Mass()),
        (" mass:share=8 ", Mass(share=8)),
        ("mass: share = 8, spread=0 ,", Mass(share=8, spread=0)),
        ("mass:head_factors=null", Mass()),
        ("stem:magnitude=none,decay=1", Stem(magnitude="none", decay=1)),
        ("paper", Stem.paper()),
        ("paper:sink_blocks=1", Stem.paper(sink_blocks=1)),
        ("angelslim:tail_blocks=2", Stem.angelslim(tail_blocks=2)),
        ("uniform", Stem.uniform()),
        ("xattention:threshold=0.7", XAttention(threshold=0.7)),
        ("stem_attention.policies.patterns:Strided:window_blocks=2", Strided(window_blocks=2)),
    ],
)
def test_a_spec_names_a_policy_and_its_fields(text, policy):
    assert parse_spec(text).policy == read_policy(text) == policy
    assert parse_spec(text).text == text.strip()


@pytest.mark.parametrize("name", ["heads.json", "me@home/heads.json", "c:/heads.json", "a:b@0.2.json"])
def test_a_file_holds_a_policy_wherever_it_lies(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("\ufeff" + Mass(share=3, head_factors=[[1, 2]]).to_json(), encoding="utf-8")
    assert read_policy(str(path)) == Mass(share=3, head_factors=[[1, 2]])
    assert read_policy(f"{path}:share=8") == Mass(share=8, head_factors=[[1, 2]])
    path.write_text(Stem.uniform().to_json())
    assert read_policy(str(path)) == Stem.uniform()  # a file may change
    assert parse_spec(f"{path}:tail_blocks=1@0.5").density == 0.5
    assert parse_spec(f"sink-window@{path}").density.policy == Stem.uniform()


def test_the_default_of_every_public_call_is_mass():
    assert read_policy() == read_policy(None) == Mass()
    for call in (sa.stem_attention, sa.stem_attention_varlen, sa.select_blocks, sa.explain):
        assert inspect.signature(call).parameters["policy"].default is None
    assert sa.explain().request.block_size == Mass().block_size
    assert sa.explain().path[-1].startswith("stem_attention.policies.mass.Mass.__call__")


def said(read, value):
    """What is refused, once it is clear that the message names the argument, what came, and a way out."""
    with pytest.raises(ValueError, match=r"^\w+: expected .+, got .+; .+") as refused:
        read(value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("masss", "did you mean mass?"),
        ("masss:share=8", "did you mean mass?"),
        ("flashprefill", "did you mean flashprefill-topk?"),
        ("", ", ".join(policy_names())),
        ("minference", "a .json file, or module:Class"),
        ("mass:shar=8", "did you mean share?"),
        ("mass:decay=1", "fields of mass among share, spread"),
        ("mass:policy=stem", "fields of mass among share, spread"),
        ("dense:_json=1", "fields of dense among block_size"),
        ("mass:share", "write it as mass:share=8"),
        ("mass:=3", "write it as mass:share=8"),
        ("mass:head_factors=[[1]]", "write it as mass:share=8"),
        ("nowhere:Class", "No module named 'nowhere'"),
        ("json:Nothing", "Nothing"),
        ("json:JSONEncoder", "module:Class of a policy"),
        (".relative:Class", "that Python can import"),
        (":Class", "that Python can import"),
        ("missing.json", "a readable JSON file"),
        ("uniform@0", "> 0 and <= 1"),
        ("uniform@1.5", "> 0 and <= 1"),
        ("uniform@NaN", "> 0 and <= 1"),
        ("uniform@", "one of mass"),
        ("uniform@densee", "did you mean dense?"),
        ("mass@0.2", "a budget or a window"),
        ("dense@0.5", "a budget or a window"),
        ("sink-window:window_blocks=1@0.2", "give the size or the density"),
        ("bigbird:random_blocks=1,seed=3@0.2", "got random_blocks;"),
    ],
)
def test_a_bad_spec_says_what_there_is(text, told):
    message = said(parse_spec, text)
    assert message.startswith("policy: ")
    assert told in message


def test_a_file_in_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "heads.json").write_text(Mass(share=8).to_json())
    assert read_policy("~/heads.json") == Mass(share=8)
    assert "a readable JSON file" in said(read_policy, "~nobody-of-this-name/heads.json")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[1]", "a readable JSON file"),
        ("{", "a readable JSON file"),
        ("[" * 100_000, "a readable JSON file"),
        ("\udcff", "a readable JSON file"),
        ('{"share": 8}', 'the key "policy"'),
        ('{"policy": "mass", "share": 0}', "share: expected a finite number > 0"),
    ],
)
def test_a_file_of_something_else_is_refused(content, told, tmp_path):
    path = tmp_path / "policy.json"
    path.write_text(content, errors="surrogateescape")
    assert told in said(read_policy, str(path))


@pytest.mark.parametrize(
    ("read", "value", "told"),
    [
        (policy_from_dict, [("policy", "mass")], "a mapping"),
        (policy_from_dict, {}, 'the key "policy"'),
        (policy_from_dict, {"policy": "mass", "shar": 8}, "did you mean share?"),
        (policy_from_dict, {"policy": "mass:share=8"}, 'write the fields beside it: {"policy": "mass", ...}'),
        (partial(policy_from_dict, trusted=False), {"policy": "mass:share=8"}, "write the fields beside it"),
        (policy_from_dict, {"policy": "mass", 1: 2}, "got 1; "),
        (policy_from_dict, {"policy": "mass", "share": "8"}, "share: expected"),
        (policy_from_json, '{"policy": "mass", "share": NaN}', "share: expected"),
        *((read_policy, value, "Mass()") for value in ({}, 3, ["mass"], Mass, lambda q, k, v: None)),
        (read_policy, "uniform@0.2", "run, inspect"),  # a density that only a length can tune
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_is_no_policy_is_refused(read, value, told):
    assert told in said(read, value)


@pytest.mark.parametrize("name", ["uniform", "stem", "sink-window", "strided", "longformer", "bigbird", "oracle"])
@pytest.mark.parametrize("density", [0.15, 0.3])
@pytest.mark.parametrize("tokens", [32768, 50000])
def test_a_density_is_met_at_the_length_asked_for(name, density, tokens):
    spec = parse_spec(f"{name}@{density}")
    tuned = spec.at(tokens)
    assert tuned.density(tokens) == pytest.approx(density, rel=0.05)
    # Only the size has changed.
    sized = {"window_blocks", "stride_blocks", "random_blocks", "ratio_short", "ratio_long"}
    changed = {field for field, value in tuned.to_dict().items() if value != spec.policy.to_dict()[field]}
    assert changed <= sized


def test_a_density_may_be_that_of_another_policy():
    assert parse_spec("sink-window@paper").at(32768).density(32768) == pytest.approx(Stem.paper().density(32768), rel=0.05)
    twice = parse_spec("bigbird@sink-window@0.2")
    assert twice.at(32768).density(32768) == pytest.approx(0.2, rel=0.1)
    assert parse_spec("uniform@dense").at(8192).density(8192) == 1.0


def test_the_nearest_size_is_taken():
    """Ten blocks have 55 pairs; windows of 1, 2 and 3 blocks keep 10, 19 and 27."""
    for density, window in ((0.18, 1), (0.34, 2), (0.36, 2), (0.48, 3), (1, 10)):
        assert parse_spec(f"sink-window:sink_blocks=0@{density}").at(10 * 128) == SinkWindow(0, window)


@pytest.mark.parametrize("text", ["sink-window@0.01", "uniform:sink_blocks=9@0.05", "sink-window:sink_blocks=0@0.4"])
def test_a_density_that_no_size_has_is_an_error_of_its_own(text):
    with pytest.raises(UnreachableDensityError, match=r"at 1280 tokens, the nearest is \d\.\d+; ask for another density"):
        parse_spec(text).at(1280)
    assert issubclass(UnreachableDensityError, ValueError)


@pytest.mark.parametrize("text", ["angelslim@0.2", "uniform@mass"])
def test_a_density_that_only_data_can_tell_is_refused(text):
    assert "known without data" in said(parse_spec(text).at, 4096)
