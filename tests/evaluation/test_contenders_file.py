"""``mass:file=heads.json``: a contender that begins with a config from a file."""

import json
from pathlib import Path

import pytest

from stem_attention import StemConfig
from stem_attention.evaluation.contenders import parse_contender
from stem_attention.policies import policy_of

CALIBRATED = StemConfig.mass(share=3.5, block_size=64, head_factors=((0.5, 2.0), (1.0, 4.25)))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "heads.json"
    path.write_text(CALIBRATED.to_json() + "\n")
    return path


def changed(config, **changes):
    return StemConfig.from_dict({**config.to_dict(), "dense_below": 0, **changes})


def test_every_field_is_the_files_and_the_name_is_the_spec(file):
    contender = parse_contender(f"mass:file={file}")
    assert contender.name == f"mass:file={file}"
    assert contender.at(4096) == changed(CALIBRATED)
    assert contender.describe(4096)["fields"] == changed(CALIBRATED).to_dict()
    assert contender.density(4096) is None


@pytest.mark.parametrize("order", ["file={file},share=6,spread=0", "share=6,file={file},spread=0"])
def test_settings_override_the_file_whatever_their_order(file, order):
    assert parse_contender("mass:" + order.format(file=file)).at(9) == changed(CALIBRATED, share=6.0, spread=0.0)


def test_a_files_own_length_to_run_dense_does_not_count_but_a_setting_does(file):
    file.write_text(changed(CALIBRATED, dense_below=5000).to_json())
    assert parse_contender(f"mass:file={file}").at(9).dense_below == 0
    assert parse_contender(f"mass:file={file},dense_below=7").at(9).dense_below == 7


def test_fields_that_a_file_leaves_out_are_the_presets(file):
    file.write_text(json.dumps({"share": 2.5}))
    assert parse_contender(f"mass:file={file}").at(9) == StemConfig.mass(share=2.5, dense_below=0)
    file.write_text(json.dumps({"beta": 0.7}))
    assert parse_contender(f"paper:file={file}").at(9) == StemConfig.paper(beta=0.7, dense_below=0)


def test_a_whole_config_is_itself_under_every_preset(file):
    assert parse_contender(f"stem:file={file}").at(9) == parse_contender(f"mass:file={file}").at(9)
    assert policy_of(parse_contender(f"stem:file={file}").at(9)).name == "mass"


def test_the_size_of_a_config_with_a_budget_is_tuned(file):
    file.write_text(StemConfig(block_size=64, beta=0.3).to_json())
    contender = parse_contender(f"stem:file={file}@0.3")
    assert contender.density(16384) == pytest.approx(0.3, rel=0.05)
    assert (contender.at(16384).block_size, contender.at(16384).beta) == (64, 0.3)


def test_a_file_that_has_changed_is_read_again(file):
    assert parse_contender(f"mass:file={file}").family == "mass"
    file.write_text("{")
    with pytest.raises(ValueError, match="readable JSON"):
        parse_contender(f"mass:file={file}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "file: expected a readable JSON file, got .*heads.json.* name a JSON file of StemConfig fields"),
        ("", "file: expected a readable JSON file"),
        ("[1]", "file: expected one JSON object of StemConfig fields, got a list in .*heads.json"),
        ("null", "file: expected one JSON object of StemConfig fields, got a NoneType"),
        ('{"colour": 1}', "fields: expected names among .* got colour"),
        ('{"file": "other.json"}', "fields: expected names among .* got file"),
        ('{"share": -1}', "share: expected a finite number > 0"),
        ('{"beta": 0.3}', "beta: expected its default"),
        ('{"head_factors": [[1, 2], [1]]}', "head_factors: expected rows of one length"),
    ],
)
def test_bad_files_are_named(file, content, message):
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        parse_contender(f"mass:file={file}")


def test_a_file_that_is_not_utf8_is_named(file):
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="file: expected a readable JSON file"):
        parse_contender(f"mass:file={file}")


@pytest.mark.parametrize("spec", ["mass:file=absent.json", "mass:file=", "mass:file=.", "mass:file=null", "mass:file=3"])
def test_files_that_are_not_there_are_named(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="file: expected a readable JSON file"):
        parse_contender(spec)


@pytest.mark.parametrize("family", ["uniform", "sink-window", "xattention"])
def test_policies_without_a_preset_take_no_file(family, file: Path):
    with pytest.raises(ValueError, match="options: expected .* got file"):
        parse_contender(f"{family}:file={file}")


def test_dense_takes_no_file(file):
    with pytest.raises(ValueError, match="settings: expected none for dense, got file"):
        parse_contender(f"dense:file={file}")
