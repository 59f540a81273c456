"""doctor, and the version."""

import json
import sys

import torch

import stem_attention
from stem_attention.cli import main
from stem_attention.cli.doctor import examine


def test_doctor_names_versions_and_explains_each_dtype_and_head_dim(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(part in out for part in (torch.__version__, "cpu:", "bfloat16"))
    assert main(["doctor", "--json"]) == 0
    cpu = [entry for entry in json.loads(capsys.readouterr().out)["backends"] if entry["device"] == "cpu"]
    assert {(entry["dtype"], entry["head_dim"]) for entry in cpu} >= {("float32", 64), ("bfloat16", 128)}
    assert all(entry["backend"] in entry["reasons"] and isinstance(entry["dense_below"], int) for entry in cpu)


def test_doctor_says_how_to_install_what_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    install = "pip install 'stem-attention[plot]'"
    assert {"package": "matplotlib", "purpose": "--plot", "install": install} in examine()["missing"]
    assert main(["doctor"]) == 0
    assert install in capsys.readouterr().out, "brackets too"


def test_version_option(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == stem_attention.__version__
