"""Contenders: dense, policies by their specs, and what the studies promise about theirs."""

from dataclasses import replace

import pytest
import torch

from stem_attention.policies import Dense, Mass, Stem, policy_names
from stem_attention.policies.spec import PolicySpec
from stem_evals.contender import Contender, parse_contender
from stem_evals.row_range import RowRange
from stem_evals.studies import DENSITIES, PARETO, SHARES, STUDIES

from .records import through_json

SMALL = Stem(block_size=16, stride=4, sink_blocks=1, local_blocks=1, tail_blocks=0, decay=1.0)


@pytest.mark.parametrize("name", policy_names())
def test_every_policy_is_a_contender_and_dense_is_the_hosts_own(name):
    contender = parse_contender(f" {name} ")
    assert contender.name == contender.family == name
    assert (contender.at(8192) is None) == (name == "dense")
    described = contender.describe(8192)
    assert through_json(described) == described


def test_settings_and_densities_belong_to_the_name_and_not_to_the_family():
    contender = parse_contender("sink-window:block_size=64@0.3")
    assert (contender.name, contender.family) == ("sink-window:block_size=64@0.3", "sink-window")
    assert contender.describe(8192)["density"] == pytest.approx(0.3, rel=0.05)
    assert contender.describe(8192)["fields"] != contender.describe(32768)["fields"]


def test_a_file_that_calibrate_wrote_is_a_contender(tmp_path):
    calibrated = Mass(share=3.5, head_factors=((0.5, 2.0), (1.0, 4.25)))
    file = tmp_path / "heads.json"
    file.write_text(calibrated.to_json())
    assert parse_contender(f"{file}:share=6").at(4096) == replace(calibrated, share=6)
    assert parse_contender(f"{file}:share=6").family == str(file)
    assert parse_contender(str(file)).describe(9)["density"] is None


def test_a_row_range_is_the_policy_inside_and_dense_outside():
    q, k, v = torch.randn(3, 1, 320, 2, 8)
    rows = RowRange(SMALL, 0.25, 0.5)
    mask = rows(q, k, v).to_mask()
    everything, inner = Dense(16)(q, k, v).to_mask(), SMALL(q, k, v).to_mask()
    assert torch.equal(mask[:, :, 5:10], inner[:, :, 5:10])
    assert torch.equal(mask[:, :, :5], everything[:, :, :5])
    assert torch.equal(mask[:, :, 10:], everything[:, :, 10:])
    assert tuple(mask[0, 0].sum(-1).tolist()) == rows.row_counts(20)
    late = rows(q[:, 96:], k, v, prompt_len=320).to_mask()
    assert torch.equal(late, mask[:, :, 6:])


@pytest.mark.parametrize("rows", [(0.5, 0.5), (-0.1, 1), (0.2, 1.1), (0.9, 0.1)])
def test_a_row_range_must_be_one(rows):
    with pytest.raises(ValueError, match="rows: expected 0 <= low < high <= 1"):
        RowRange(SMALL, *rows)


@pytest.mark.parametrize("rows", [(0.0, 0.25), (0.75, 1.0)])
def test_a_density_is_about_the_sparse_rows_alone(rows):
    contender = Contender("part", PolicySpec("stem", RowRange(SMALL, *rows), 0.28))
    q, k, v = torch.randn(3, 1, 2048, 1, 4)
    counts = contender.at(2048)(q, k, v).counts[0, 0].tolist()
    inside = range(round(rows[0] * 128), round(rows[1] * 128))
    share = sum(counts[row] for row in inside) / sum(row + 1 for row in inside)
    assert share == pytest.approx(0.28, rel=0.05)
    assert share == pytest.approx(contender.describe(2048)["density"])
    assert contender.describe(2048)["fields"]["rows"] == list(rows)
    assert all(counts[row] == row + 1 for row in range(128) if row not in inside)


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
