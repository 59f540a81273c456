"""Contenders: dense, and policies by their specs."""

import pytest
import torch

from stem_attention.policies import Dense, Mass, Stem, policy_names
from stem_attention.policies.spec import PolicySpec
from stem_evals.contender import Contender, parse_contender
from stem_evals.row_range import RowRange

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
    assert parse_contender(str(file)).at(4096) == calibrated
    assert parse_contender(f"{file}:share=6").at(4096).share == 6
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
