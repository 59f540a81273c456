"""doctor, and the version."""

import json
import sys

import pytest
import torch
from rich.console import Console

import stem_attention
from stem_attention.cli import main
from stem_attention.cli.doctor import _backend_table, examine


def test_doctor_names_versions_devices_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert "cpu:" in out
    assert "bfloat16" in out


def test_doctor_json_explains_each_dtype_and_head_dim(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    cpu = [entry for entry in report["backends"] if entry["device"] == "cpu"]
    assert {(entry["dtype"], entry["head_dim"]) for entry in cpu} >= {("float32", 64), ("bfloat16", 128)}
    assert all(entry["backend"] in entry["reasons"] for entry in cpu)


def test_doctor_says_how_to_install_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert {"package": "matplotlib", "purpose": "--plot", "install": "pip install 'stem-attention[plot]'"} in examine()[
        "missing"
    ]


def test_doctor_prints_the_brackets_of_an_extra(capsys: pytest.CaptureFixture[str]) -> None:
    reason = "triton is not installed: pip install 'stem-attention[gpu]'"
    entry = {"device": "cpu", "dtype": "float32", "head_dim": 64, "backend": "torch", "reasons": {"triton": reason}}
    Console(width=200, file=sys.stdout).print(_backend_table([entry]))
    assert reason in capsys.readouterr().out


def test_version_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == stem_attention.__version__
