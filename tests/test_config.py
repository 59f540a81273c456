"""StemConfig refuses every bad value by name, and travels through JSON unchanged."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_attention import StemConfig

FIELDS = [field.name for field in dataclasses.fields(StemConfig) if field.init]
INTEGERS = {
    "block_size": 1,
    "stride": 1,
    "knee_tokens": 1,
    "min_blocks": 1,
    "sink_blocks": 0,
    "local_blocks": 1,
    "tail_blocks": 0,
    "dense_below": 0,
    "dense_layers": 0,
    "query_pool": 1,
    "key_pool": 1,
}
SHARES = ("decay", "ratio_short", "ratio_long")
NAMES = ("keep", "magnitude", "schedule", "forced")


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [-1, 2.0, 1.5, "4", True, math.nan, [1]])
def test_integer_fields_refuse_other_values(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: expected an integer >= {INTEGERS[name]}, got "):
        StemConfig(**{name: value})


@pytest.mark.parametrize("name", INTEGERS)
def test_integer_fields_refuse_one_below_their_least(name):
    with pytest.raises(ValueError, match=rf"^{name}: "):
        StemConfig(**{name: INTEGERS[name] - 1})


@pytest.mark.parametrize("name", [name for name in INTEGERS if name not in ("min_blocks", "dense_below")])
def test_none_is_refused_where_it_means_nothing(name):
    with pytest.raises(ValueError, match=rf"^{name}: expected an integer .* got None"):
        StemConfig(**{name: None})


@pytest.mark.parametrize("name", SHARES)
@pytest.mark.parametrize("value", [0, 0.0, -0.1, 1.01, math.nan, math.inf, "0.5", None, True])
def test_shares_lie_above_zero_and_at_most_at_one(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: expected a finite number > 0 and <= 1, got "):
        StemConfig(**{name: value})


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, -math.inf, 10**400, "0.2", None, False])
def test_beta_is_finite_and_not_negative(value):
    with pytest.raises(ValueError, match=r"^beta: expected a finite number >= 0, got "):
        StemConfig(beta=value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ["", "LOG", "Smooth", None, 1, math.nan])
def test_names_are_exact(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: expected one of .* got {value!r}"):
        StemConfig(**{name: value})


@pytest.mark.parametrize("name", NAMES)
def test_names_that_cannot_be_hashed_are_refused_too(name):
    with pytest.raises(ValueError, match=rf"^{name}: expected one of"):
        StemConfig(**{name: ["log"]})


@pytest.mark.parametrize(("block_size", "stride"), [(128, 24), (64, 128), (100, 16)])
def test_block_size_is_a_multiple_of_stride(block_size, stride):
    with pytest.raises(ValueError, match=rf"^block_size: expected a multiple of stride={stride}, got {block_size}"):
        StemConfig(block_size=block_size, stride=stride)


def test_long_prompts_keep_no_larger_share_than_short_ones():
    with pytest.raises(ValueError, match=r"^ratio_long: expected at most ratio_short=0\.2, got 0\.3"):
        StemConfig(ratio_long=0.3)


def test_a_config_cannot_be_changed_and_equal_configs_hash_equal():
    config = StemConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.beta = 0.1
    assert StemConfig(decay=1) == StemConfig(decay=1.0)
    assert hash(StemConfig(decay=1)) == hash(StemConfig(decay=1.0))
    assert dataclasses.replace(config, beta=0.1) == StemConfig(beta=0.1) != config


SHARED = {
    "block_size": st.sampled_from([32, 64, 128]),
    "sink_blocks": st.integers(0, 10),
    "local_blocks": st.integers(1, 10),
    "tail_blocks": st.integers(0, 10),
    "dense_below": st.none() | st.integers(0, 10**6),
    "dense_layers": st.integers(0, 100),
}
BUDGET = st.fixed_dictionaries(
    {
        **SHARED,
        "keep": st.just("budget"),
        "stride": st.sampled_from([1, 4, 8, 16]),
        "beta": st.floats(0, 10),
        "magnitude": st.sampled_from(["log", "zscore", "none"]),
        "decay": st.floats(0.01, 1),
        "schedule": st.sampled_from(["smooth", "step", "angelslim"]),
        "ratio_short": st.floats(0.5, 1),
        "ratio_long": st.floats(0.01, 0.5),
        "knee_tokens": st.integers(1, 10**6),
        "min_blocks": st.none() | st.integers(1, 100),
        "forced": st.sampled_from(["inside", "extra"]),
    }
)
MASS = st.fixed_dictionaries(
    {
        **SHARED,
        "keep": st.just("mass"),
        "share": st.floats(0.01, 100),
        "spread": st.floats(0, 10),
        "query_pool": st.sampled_from([1, 8, 32]),
        "key_pool": st.sampled_from([1, 16, 32]),
        "head_factors": st.none()
        | st.integers(1, 4).flatmap(
            lambda heads: st.lists(st.tuples(*[st.floats(1e-6, 1e6)] * heads), min_size=1, max_size=3).map(tuple)
        ),
    }
)


@given(BUDGET | MASS)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_json_and_dict_round_trips_give_an_equal_config(fields):
    config = StemConfig(**fields)
    assert list(config.to_dict()) == FIELDS
    assert fields.items() <= config.to_dict().items()
    assert StemConfig.from_dict(config.to_dict()) == config
    assert StemConfig.from_json(config.to_json()) == config
    assert hash(StemConfig.from_json(config.to_json())) == hash(config)
    assert StemConfig.from_json(config.to_json()).to_json() == config.to_json()


@pytest.mark.parametrize("preset", [StemConfig, StemConfig.paper, StemConfig.angelslim])
def test_presets_round_trip_and_take_changes(preset):
    assert StemConfig.from_json(preset().to_json()) == preset()
    changed = preset(beta=0.3, tail_blocks=5, stride=4)
    assert (changed.beta, changed.tail_blocks, changed.stride) == (0.3, 5, 4)
    same = {name: value for name, value in changed.to_dict().items() if name not in ("beta", "tail_blocks", "stride")}
    assert same.items() <= preset().to_dict().items()
    with pytest.raises(ValueError, match=r"^decay: "):
        preset(decay=2)


def test_presets_hold_what_the_method_page_says():
    default, paper, public = StemConfig(), StemConfig.paper(), StemConfig.angelslim()
    assert (default.block_size, default.stride, default.beta, default.decay) == (128, 16, 0.2, 0.7)
    assert (default.schedule, default.magnitude, default.forced) == ("smooth", "log", "inside")
    assert (default.sink_blocks, default.local_blocks, default.tail_blocks) == (1, 2, 2)
    assert (default.ratio_short, default.ratio_long, default.knee_tokens) == (0.2, 0.1, 16384)
    assert (default.min_blocks, default.dense_layers) == (None, 0)
    assert (paper.schedule, paper.tail_blocks, paper.min_blocks) == ("step", 0, None)
    assert (paper.sink_blocks, paper.local_blocks) == (public.sink_blocks, public.local_blocks) == (4, 4)
    assert (public.schedule, public.magnitude, public.forced, public.stride) == ("angelslim", "zscore", "extra", 8)
    assert (public.tail_blocks, public.dense_layers) == (0, 2)


def test_absent_fields_take_their_defaults():
    assert StemConfig.from_dict({}) == StemConfig()
    assert StemConfig.from_json('{"decay": 1}') == StemConfig(decay=1.0)


def test_unknown_fields_are_named():
    with pytest.raises(ValueError, match=r"^fields: expected names among .*block_size, .* got alpha, gamma"):
        StemConfig.from_dict({"gamma": 1, "alpha": 2, "beta": 0.2})
    with pytest.raises(ValueError, match="got _json"):
        StemConfig.from_dict({"_json": "{}"})


@pytest.mark.parametrize("fields", [None, [("beta", 0.1)], "beta", 3])
def test_from_dict_wants_a_mapping(fields):
    with pytest.raises(ValueError, match=r"^fields: expected a mapping of StemConfig fields, got "):
        StemConfig.from_dict(fields)


@pytest.mark.parametrize("text", ["", "{", "beta=0.2", "[1, 2]", "3", "null", '{"beta": NaN}', '{"beta": "0.2"}'])
def test_from_json_refuses_other_text(text):
    with pytest.raises(ValueError, match=r"^(text|fields|beta): expected "):
        StemConfig.from_json(text)


def test_field_names_that_are_no_strings_are_refused():
    with pytest.raises(ValueError, match=r"^fields: "):
        StemConfig.from_dict({1: 2, "nope": 3})


MESSAGES = {
    "sink_blocks": ({"sink_blocks": -1}, "sink_blocks: expected an integer >= 0, got -1; pass sink_blocks=1 or more"),
    "stride": ({"stride": "4"}, "stride: expected an integer >= 1, got '4'; pass stride=1 or more"),
    "decay": ({"decay": 0}, "decay: expected a finite number > 0 and <= 1, got 0; pass a decay in that range"),
    "beta": ({"beta": "x"}, "beta: expected a finite number >= 0, got 'x'; pass a beta in that range"),
    "forced": ({"forced": "in"}, "forced: expected one of inside, extra, got 'in'; pick one of these names"),
    "block_size": (
        {"block_size": 100},
        "block_size: expected a multiple of stride=16, got 100; change block_size or stride so that one divides the other",
    ),
    "ratio_long": (
        {"ratio_long": 0.5},
        "ratio_long: expected at most ratio_short=0.2, got 0.5; long prompts keep a smaller share than short ones; "
        "raise ratio_short too",
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_are_whole(name):
    fields, message = MESSAGES[name]
    with pytest.raises(ValueError, match=r"expected") as refused:
        StemConfig(**fields)
    assert str(refused.value) == message


def test_messages_of_the_readers_are_whole():
    known = ", ".join(FIELDS)
    expected = "text: expected a JSON object of StemConfig fields, got "
    for read, wrong, message in (
        (StemConfig.from_dict, 3, "fields: expected a mapping of StemConfig fields, got int; pass a dict"),
        (StemConfig.from_dict, {"x": 1}, f"fields: expected names among {known}, got x; remove or correct them"),
        (StemConfig.from_json, 3, f"{expected}int; pass a string"),
        (
            StemConfig.from_json,
            "{",
            f"{expected}invalid JSON (Expecting property name enclosed in double quotes: line 1 column",
        ),
    ):
        with pytest.raises(ValueError, match=r"expected") as refused:
            read(wrong)
        assert str(refused.value).startswith(message)
    with pytest.raises(ValueError, match=r"; fix the JSON$"):
        StemConfig.from_json("{")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"beta": 1' + "0" * 5000 + "}"])
def test_hostile_json_is_refused_like_any_other(text):
    with pytest.raises(ValueError, match=r"^(text|beta): expected "):
        StemConfig.from_json(text)


@pytest.mark.parametrize("name", INTEGERS)
def test_integer_fields_take_their_least(name):
    others = {"block_size": {"stride": 1}, "query_pool": {"keep": "mass"}, "key_pool": {"keep": "mass"}}.get(name, {})
    assert getattr(StemConfig(**{name: INTEGERS[name], **others}), name) == INTEGERS[name]


def test_shares_and_beta_take_their_limits_and_become_floats():
    config = StemConfig(beta=0, decay=1, ratio_short=1, ratio_long=1)
    assert [type(value) for value in (config.beta, config.decay, config.ratio_short, config.ratio_long)] == [float] * 4
    assert (config.beta, config.decay, config.ratio_short, config.ratio_long) == (0.0, 1.0, 1.0, 1.0)
    assert StemConfig(ratio_long=0.2).ratio_long == 0.2


def test_presets_hold_every_published_number():
    published = {"sink_blocks": 4, "local_blocks": 4, "tail_blocks": 0}
    assert StemConfig.paper() == StemConfig(schedule="step", **published)
    assert StemConfig.angelslim() == StemConfig(
        schedule="angelslim", magnitude="zscore", forced="extra", stride=8, knee_tokens=20480, dense_layers=2, **published
    )
    assert StemConfig.paper(schedule="smooth", sink_blocks=1).schedule == "smooth"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": "mass", "decay": 0.5}, "decay: expected its default, 0.7, got 0.5; it means nothing under keep='mass'; "
         "leave it out, or take keep='budget'"),
        ({"share": 2.0}, "share: expected its default, 4.0, got 2.0; it means nothing under keep='budget'; "
         "leave it out, or take keep='mass'"),
        ({"keep": "mass", "block_size": 48}, "block_size: expected a multiple of key_pool=32, got 48; "
         "change block_size or key_pool so that one divides the other"),
        ({"keep": "mass", "block_size": 48, "query_pool": 32, "key_pool": 16}, "block_size: expected a multiple of "
         "query_pool=32, got 48; change block_size or query_pool so that one divides the other"),
    ],
)  # fmt: skip
def test_settings_of_the_other_rule_are_refused(fields, message):
    with pytest.raises(ValueError, match="expected") as refused:
        StemConfig(**fields)
    assert str(refused.value) == message


def test_every_field_belongs_to_one_rule_or_to_both():
    assert set(dict.fromkeys(FIELDS)) == {
        "keep", "block_size", "sink_blocks", "local_blocks", "tail_blocks", "dense_below", "dense_layers", "stride", "beta",
        "magnitude", "decay", "schedule", "ratio_short", "ratio_long", "knee_tokens", "min_blocks", "forced", "share",
        "spread", "query_pool", "key_pool", "head_factors",
    }  # fmt: skip
    assert StemConfig.mass() == StemConfig(keep="mass", block_size=64)
    assert StemConfig.mass(share=2).share == 2.0


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "1", None, True])
def test_the_share_is_above_zero(value):
    with pytest.raises(ValueError, match=r"^share: expected a finite number > 0, got "):
        StemConfig.mass(share=value)


LAYERS = ((1.0, 2.0, 0.5, 4.0), (3.0, 0.25, 1.5, 8.0))
EXPECTED = (
    "head_factors: expected None, or a row for each layer (or one for all) of finite numbers > 0, one for each query head"
)
WAY_OUT = "take those that stem-attention calibrate writes"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], f"{EXPECTED}, got list []; {WAY_OUT}"),
        (2.0, f"{EXPECTED}, got float 2.0; {WAY_OUT}"),
        ("ab", f"{EXPECTED}, got str 'ab'; {WAY_OUT}"),
        ({0: [1.0]}, f"{EXPECTED}, got dict {{0: [1.0]}}; {WAY_OUT}"),
        ([1.0, 2.0], f"{EXPECTED}, got list [1.0, 2.0]; {WAY_OUT}"),
        ([[1.0], []], f"{EXPECTED}, got list [[1.0], []]; {WAY_OUT}"),
        ([[1.0], None], f"{EXPECTED}, got list [[1.0], None]; {WAY_OUT}"),
        ([1.0] * 99, f"{EXPECTED}, got list [{'1.0, ' * 11}1.0,; {WAY_OUT}"),
        ([[1.0], [1.0, 2.0]], f"head_factors: expected rows of one length, got rows of [1, 2]; {WAY_OUT}"),
        *(
            ([[1.0], [factor]], f"{EXPECTED}, got {factor!r}; {WAY_OUT}")
            for factor in (0, -1.0, math.nan, math.inf, 10**400, "1", None, True, [1.0])
        ),
    ],
)
def test_head_factors_are_rows_of_numbers_above_zero(value, message):
    with pytest.raises(ValueError, match="expected") as refused:
        StemConfig.mass(head_factors=value)
    assert str(refused.value) == message


def test_head_factors_belong_to_keep_by_mass():
    with pytest.raises(ValueError, match="expected") as refused:
        StemConfig(head_factors=[[1, 2]])
    assert str(refused.value) == (
        "head_factors: expected its default, None, got ((1.0, 2.0),); it means nothing under keep='budget'; "
        "leave it out, or take keep='mass'"
    )


def test_head_factors_become_tuples_of_floats_whatever_rows_they_came_in():
    config = StemConfig.mass(head_factors=[[1, 2], (0.5, 3)])
    assert config.head_factors == ((1.0, 2.0), (0.5, 3.0))
    assert {type(factor) for row in config.head_factors for factor in row} == {float}
    same = StemConfig.from_json('{"keep": "mass", "block_size": 64, "head_factors": [[1.0, 2], [0.5, 3]]}')
    assert same == config
    assert hash(same) == hash(config)
    assert config != StemConfig.mass(head_factors=[[1, 2], [0.5, 4]])
    assert config != StemConfig.mass()


def test_a_layer_takes_its_row_and_all_else_of_the_config():
    config = StemConfig.mass(share=3.0, dense_layers=1, head_factors=LAYERS)
    for layer, row in enumerate(LAYERS):
        own = config.for_layer(layer)
        assert own == StemConfig.mass(share=3.0, dense_layers=1, head_factors=(row,))
        assert hash(own) == hash(StemConfig.mass(share=3.0, dense_layers=1, head_factors=(row,)))
        assert StemConfig.from_json(own.to_json()) == own
        assert own.for_layer(layer) is own
        assert config.for_layer(layer) is own  # a graph of torch.compile cannot build one


def test_a_single_row_is_for_every_layer():
    config = StemConfig.mass(head_factors=LAYERS[:1])
    assert all(config.for_layer(layer) is config for layer in (-1, 0, 7))


def test_without_head_factors_every_layer_takes_the_config_itself():
    for config in (StemConfig(), StemConfig.mass()):
        assert config.for_layer(7) is config
        assert config.for_layer(7, slice(2, 3)) is config


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_that_has_no_row_is_refused(layer):
    with pytest.raises(ValueError, match="expected") as refused:
        StemConfig.mass(head_factors=LAYERS).for_layer(layer)
    assert str(refused.value) == f"layer: expected one of the 2 layers of head_factors, got {layer}; calibrate for this model"


@pytest.mark.parametrize("rows", [LAYERS, LAYERS[1:]], ids=["by-layer", "for-all"])
def test_a_rank_takes_the_factors_of_its_heads(rows):
    config = StemConfig.mass(share=3.0, head_factors=rows)
    assert config.for_layer(1, slice(1, 3)) == StemConfig.mass(share=3.0, head_factors=[LAYERS[1][1:3]])
    assert config.for_layer(1, slice(2, None)) == StemConfig.mass(share=3.0, head_factors=[LAYERS[1][2:]])
    with pytest.raises(ValueError, match="^head_factors: expected "):
        config.for_layer(1, slice(4, 8))


def test_the_share_of_a_head_is_the_share_times_its_factor():
    config = StemConfig.mass(share=3.0, head_factors=LAYERS)
    assert [config.for_layer(1).head_share(head) for head in range(4)] == [9.0, 0.75, 4.5, 24.0]
    assert [StemConfig.mass(share=3.0).head_share(head) for head in (0, 31)] == [3.0, 3.0]
