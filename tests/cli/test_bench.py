"""bench: what it prints, and that it refuses to print."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from stem_attention import StemConfig, __version__, block_sparse_attention
from stem_attention.cli import main
from stem_attention.evaluation import bench_checks

SMALL = ["--heads", "2", "--kv-heads", "1", "--repeats", "2"]


def report(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["bench", *arguments, "--json"]) == 0
    parsed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return parsed


def test_attention_suite_prints_medians_ratio_and_density(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--lengths", "600,900", *SMALL]) == 0
    out = capsys.readouterr().out
    for part in ("600", "900", "density", "dense SDPA", "whole", "ratio", "selection share", "Medians of 2 rounds", "threads"):
        assert part in out
    assert out.count("Checked at") == 2


def test_json_holds_every_repeat(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        answer = report(["--lengths", "1500", *SMALL, "--repeats", "3", "--threads", "1"], capsys)
    finally:
        torch.set_num_threads(threads)
    (result,) = answer["results"]
    assert answer["threads"] == 1
    assert answer["backend"] == "torch"
    assert {name: len(times) for name, times in result["seconds"].items()} == {
        "dense SDPA": 3, "selection": 3, "attention": 3, "whole": 3, "default": 3,
    }  # fmt: skip
    assert 0 < result["density"] < 1
    assert 0 < result["measures"]["selection share"] < 1
    medians = result["medians"]
    assert result["measures"]["ratio"] == pytest.approx(medians["dense SDPA"] / medians["whole"])


def test_kernel_suite_times_compiled_flex_attention_on_the_same_lists(capsys: pytest.CaptureFixture[str]) -> None:
    # The last block is not full, and without the dense tail the lists are narrower than a row.
    lists = ["--set", "tail_blocks=0", "--set", "ratio_short=0.1", "--set", "sink_blocks=1", "--set", "local_blocks=2"]
    (result,) = report(["--suite", "kernel", "--lengths", "1500", *SMALL, *lists], capsys)["results"]
    medians, tflops = result["medians"], result["tflops"]
    assert result["left_out"] == {}
    assert medians.keys() == tflops.keys() == {"dense SDPA", "FlexAttention", "Stem"}
    assert result["measures"]["ratio"] == pytest.approx(medians["FlexAttention"] / medians["Stem"])
    assert result["measures"]["dense ratio"] == pytest.approx(medians["dense SDPA"] / medians["Stem"])
    blocks = 12
    everything = 2 * blocks * (blocks + 1) / 2
    kept = result["density"] * everything - 2 * blocks / 2
    assert tflops["Stem"] * medians["Stem"] == pytest.approx(kept * 4 * 64 * 128**2 / 1e12)
    assert tflops["dense SDPA"] * medians["dense SDPA"] == pytest.approx((everything - blocks) * 4 * 64 * 128**2 / 1e12)


def test_selection_suite_reports_the_rate_of_differing_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    (result,) = report(["--suite", "selection", "--lengths", "3000", *SMALL], capsys)["results"]
    assert result["medians"].keys() == {"eager Stem", "Stem"}
    assert result["measures"]["differing blocks"] == 0
    assert result["measures"]["ratio"] > 0


def test_no_dense_leaves_the_dense_peers_out_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    (result,) = report(["--no-dense", "--lengths", "600", *SMALL], capsys)["results"]
    assert result["left_out"] == {"dense SDPA": "not asked for"}
    assert "ratio" not in result["measures"]


def test_model_gives_the_heads_and_options_override_it(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "gemma", "--head-dim", "16", "--lengths", "300", "--repeats", "1"]
    answer = report(arguments, capsys)
    assert (answer["heads"], answer["kv_heads"], answer["head_dim"]) == (8, 4, 16)


def test_plot_writes_a_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "times.png"
    report(["--lengths", "300,600", *SMALL, "--plot", str(file)], capsys)
    assert file.read_bytes().startswith(b"\x89PNG")


def test_a_wrong_result_prints_no_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(*arguments: Any) -> torch.Tensor:
        out: torch.Tensor = block_sparse_attention(*arguments)
        out[:, -1] *= 1.01
        return out

    monkeypatch.setattr(bench_checks, "block_sparse_attention", wrong)
    assert main(["bench", "--lengths", "600", *SMALL]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "wrong result at 600 tokens" in captured.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--suite", "magic"], "--suite: expected one of attention, kernel, selection, serving, ttft, got 'magic'"),
        (["--model", "magic"], "--model: expected one of llama-3.1-8b"),
        (["--plot", "times.jpg"], "--plot: expected a file that ends in .png"),
        (["--model", "gemma", "--kv-heads", "3"], "--kv-heads: expected a divisor of --heads 8"),
    ],
)
def test_bad_option_is_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"stem-attention: {says}")
    assert captured.err.count("\n") == 1


def test_a_calibrated_config_is_of_a_model_that_bench_has_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "heads.json"
    file.write_text(StemConfig.mass(head_factors=[[1.0] * 8] * 2).to_json())
    assert main(["bench", "--config", str(file), "--device", "cpu"]) == 1
    assert "--config: expected no head_factors" in capsys.readouterr().err


def test_the_command_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "stem_attention.cli", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == __version__
