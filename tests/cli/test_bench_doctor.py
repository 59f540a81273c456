"""bench and doctor."""

import json
import sys

import pytest
import torch

from stem_attention.cli import main
from stem_attention.cli.doctor import examine
from stem_attention.config import StemConfig
from stem_attention.evaluation.speed import Check, Shape, check, random_inputs


def test_bench_prints_medians_ratio_and_density(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--lengths", "600,900", "--heads", "2", "--kv-heads", "1", "--repeats", "2"]) == 0
    out = capsys.readouterr().out
    for part in (
        "600",
        "900",
        "density",
        "dense SDPA",
        "selection share",
        "Medians of 2 rounds",
        "torch",
        "threads",
        "Checked",
    ):
        assert part in out


def test_bench_json_holds_every_repeat(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        arguments = [
            "bench",
            "--lengths",
            "1500",
            "--heads",
            "2",
            "--kv-heads",
            "1",
            "--repeats",
            "3",
            "--threads",
            "1",
            "--json",
        ]
        assert main(arguments) == 0
    finally:
        torch.set_num_threads(threads)
    report = json.loads(capsys.readouterr().out)
    (result,) = report["results"]
    assert report["threads"] == 1
    assert [len(result[name]) for name in ("dense_seconds", "selection_seconds", "attention_seconds")] == [3, 3, 3]
    assert 0 < result["density"] < 1
    assert 0 < result["selection_share"] < 1
    assert result["ratio"] == pytest.approx(result["dense_median"] / result["sparse_median"])


@pytest.mark.parametrize("preset", [StemConfig(), StemConfig.paper(), StemConfig.angelslim()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_passes_on_what_the_library_computes(preset: StemConfig, dtype: torch.dtype) -> None:
    q, k, v = random_inputs(Shape(1000, 4, 2, 64, dtype, torch.device("cpu")), seed=0)
    assert check(q, k, v, preset).problem(dtype) is None


@pytest.mark.parametrize(("error", "different"), [(1e-3, 0.0), (float("nan"), 0.0), (0.0, 0.5)])
def test_check_refuses_wrong_results(error: float, different: float) -> None:
    assert Check(3, error, 1e-6, different).problem(torch.float32) is not None


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


def test_version_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip().count(".") == 2
