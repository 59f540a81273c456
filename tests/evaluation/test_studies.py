"""Studies: what they promise about their contenders."""

import json

import pytest

from stem_attention import StemConfig
from stem_attention.evaluation.studies import BASE, DENSITIES, PARETO, SHARES, STUDIES, study
from stem_attention.policies import policy_names


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("tokens", [8192, 32768])
def test_contenders_have_names_of_their_own_and_describe_themselves(name, tokens):
    contenders = study(name)
    assert contenders[0].name == "dense"
    assert len({contender.name for contender in contenders}) == len(contenders)
    reachable = [contender for contender in contenders if contender.is_reachable(tokens)]
    described = [contender.describe(tokens) for contender in reachable]
    assert json.loads(json.dumps(described)) == described


def test_an_unknown_study_is_named():
    with pytest.raises(ValueError, match="study: expected one of ablation, pareto, .* got 'oblation'"):
        study("oblation")


def test_ablation_changes_one_field_of_one_base():
    _, base, uniform, *changed = study("ablation")
    assert base.name == BASE
    before = base.at(16384).to_dict()
    for contender in changed:
        after = contender.at(16384).to_dict()
        differing = {field for field in before if before[field] != after[field]}
        assert contender.name == f"{differing.pop()}={contender.name.split('=')[1]}"
        assert not differing
    assert {contender.name.split("=")[0] for contender in changed} == {
        "decay", "beta", "stride", "block_size", "magnitude", "sink_blocks", "local_blocks", "tail_blocks", "dense_layers",
    }  # fmt: skip
    assert uniform.at(16384).decay == 1


@pytest.mark.parametrize("tokens", [8192, 16384, 32768])
def test_ablation_compares_uniform_at_the_compute_of_the_base(tokens):
    _, base, uniform, *_ = study("ablation")
    assert uniform.density(tokens) == pytest.approx(base.density(tokens), rel=0.05)


def test_pareto_has_every_policy_at_every_density_that_a_long_prompt_allows():
    contenders = study("pareto")
    assert {*PARETO, "xattention", "dense"} == set(policy_names())
    assert [c.name for c in contenders if c.family == "mass"] == [f"mass:share={share}" for share in SHARES]
    for name in PARETO:
        own = [contender for contender in contenders if contender.family == name]
        assert all(c.density(32768) == pytest.approx(d, rel=0.05) for c, d in zip(own, DENSITIES, strict=True))


def test_pareto64_reaches_lower_densities_on_short_prompts():
    reached = {name: sum(contender.is_reachable(8192) for contender in study(name)) for name in ("pareto", "pareto64")}
    assert reached["pareto64"] > reached["pareto"]
    assert all(contender.at(32768).block_size == 64 for contender in study("pareto64") if contender.family == "stem")


@pytest.mark.parametrize("tokens", [8192, 16384, 32768])
def test_equal_means_within_five_percent_of_stem(tokens):
    stem = StemConfig()
    known = {c.name: c.density(tokens) for c in study("equal")}
    assert {name.split("@")[0] for name in known} == {*policy_names(), "paper", "mass"}
    for name, density in known.items():
        if name not in ("dense", "paper", "xattention", "mass"):
            assert density == pytest.approx(known["stem"], rel=0.05)
    assert study("equal")[1].at(tokens).to_dict() == {**stem.to_dict(), "dense_below": 0}


def test_table1_differs_in_the_value_term_alone():
    configs = [contender.at(16384) for contender in study("table1")[1:]]
    for published, without, zscore in (configs[:3], configs[3:]):
        assert without.to_dict() == {**published.to_dict(), "beta": 0.0}
        assert zscore.to_dict() == {**published.to_dict(), "magnitude": "zscore"}


@pytest.mark.parametrize("tokens", [8192, 16384, 32768])
def test_figure3_drops_the_same_share_or_the_same_number_of_blocks_early_and_late(tokens):
    _, early, late, equal, *_ = study("figure3")
    assert (early.rows, late.rows, equal.rows) == ((0.0, 0.25), (0.75, 1.0), (0.75, 1.0))
    assert late.density(tokens) == pytest.approx(early.density(tokens), rel=0.05)
    blocks = tokens // 64
    pairs = [sum(row + 1 for row in range(round(c.rows[0] * blocks), round(c.rows[1] * blocks))) for c in (early, equal)]
    dropped = [count * (1 - c.density(tokens)) for count, c in zip(pairs, (early, equal), strict=True)]
    assert dropped[1] == pytest.approx(dropped[0], rel=0.05)
