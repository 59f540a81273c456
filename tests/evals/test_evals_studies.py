"""Studies: what they promise about their contenders."""

import pytest

from stem_attention.policies import Stem, policy_names
from stem_evals.studies import DENSITIES, PARETO, SHARES, STUDIES

from .records import through_json


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("tokens", [8192, 32768])
def test_contenders_have_names_of_their_own_and_describe_themselves(name, tokens):
    contenders = STUDIES[name]()
    assert len({contender.name for contender in contenders}) == len(contenders)
    described = [contender.describe(tokens) for contender in contenders if contender.is_reachable(tokens)]
    assert through_json(described) == described


def test_ablation_changes_one_field_of_one_base():
    base, uniform, *changed = STUDIES["ablation"]()
    before = base.at(16384).to_dict()
    for contender in changed:
        after = contender.at(16384).to_dict()
        differing = {field for field in before if before[field] != after[field]}
        assert {contender.name.split("=")[0]} == differing
    assert {contender.name.split("=")[0] for contender in changed} == {
        "decay", "beta", "stride", "block_size", "magnitude", "sink_blocks", "local_blocks", "tail_blocks"
    }  # fmt: skip
    assert uniform.at(16384).decay == 1
    for tokens in (8192, 16384, 32768):  # at the compute of the base
        assert uniform.at(tokens).density(tokens) == pytest.approx(base.at(tokens).density(tokens), rel=0.05)


def test_pareto_has_every_policy_at_every_density_that_a_long_prompt_allows():
    contenders = STUDIES["pareto"]()
    assert {*PARETO, "xattention", "mass", "dense", "paper", "angelslim"} == set(policy_names())
    assert [c.name for c in contenders if c.family == "mass"] == [f"mass:share={share}" for share in SHARES]
    for name in PARETO:
        own = [contender.at(32768).density(32768) for contender in contenders if contender.family == name]
        assert own == pytest.approx(DENSITIES, rel=0.05)


def test_pareto64_reaches_lower_densities_on_short_prompts():
    reached = {name: sum(contender.is_reachable(8192) for contender in STUDIES[name]()) for name in ("pareto", "pareto64")}
    assert reached["pareto64"] > reached["pareto"]
    assert all(contender.at(32768).block_size == 64 for contender in STUDIES["pareto64"]())


@pytest.mark.parametrize("tokens", [8192, 16384, 32768])
def test_equal_means_within_five_percent_of_stem(tokens):
    known = {contender.name: contender.at(tokens).density(tokens) for contender in STUDIES["equal"]()}
    assert STUDIES["equal"]()[0].at(tokens) == Stem()
    assert {name.split("@")[0] for name in known} == {*policy_names()} - {"dense", "angelslim"}
    for name, density in known.items():
        if name not in ("paper", "xattention", "mass"):
            assert density == pytest.approx(known["stem"], rel=0.05)


def test_table1_differs_in_the_value_term_alone():
    policies = [contender.at(16384) for contender in STUDIES["table1"]()]
    for published, without, zscore in (policies[:3], policies[3:]):
        assert without.to_dict() == {**published.to_dict(), "beta": 0.0}
        assert zscore.to_dict() == {**published.to_dict(), "magnitude": "zscore"}


@pytest.mark.parametrize("tokens", [8192, 16384, 32768])
def test_figure3_drops_the_same_share_or_the_same_number_of_blocks_early_and_late(tokens):
    early, late, equal, *_ = (contender.at(tokens) for contender in STUDIES["figure3"]())
    assert [(one.low, one.high) for one in (early, late, equal)] == [(0.0, 0.25), (0.75, 1.0), (0.75, 1.0)]
    assert late.density(tokens) == pytest.approx(early.density(tokens), rel=0.05)
    blocks = tokens // 64
    dropped = [blocks * (blocks + 1) // 2 - sum(one.row_counts(blocks)) for one in (early, equal)]
    assert dropped[1] == pytest.approx(dropped[0], rel=0.05)
