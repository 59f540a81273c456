"""run and inspect end to end, on a tiny random model and on the embedded one."""

import json
from pathlib import Path

import pytest

from stem_attention.cli import main
from stem_attention.evaluation.embedded import EMBEDDED_INSTALL, embedded_gguf

SPARSE = ["--set", "dense_below=0", "--set", "block_size=64", "--context", "2300"]


def test_run_prints_answers_times_density_and_agreement(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["run", "--model", str(tiny_llama), *SPARSE, "--max-new-tokens", "4", "--verbose"])
    out = capsys.readouterr().out
    assert code == 3, "a random model cannot find the planted number"
    for part in (
        "time to first token",
        "of it attention",
        "kept density",
        "answer",
        "planted",
        "Agreement over the last 64",
        "layer",
    ):
        assert part in out


def test_run_json_is_alone_on_stdout_and_complete(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", "--model", str(tiny_llama), *SPARSE, "--max-new-tokens", "4", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert 2100 <= report["prompt_tokens"] <= 2300
    assert report["config"]["block_size"] == 64
    assert [layer["layer"] for layer in report["sparse"]["layers"]] == [0, 1]
    assert all(layer["sparse"] and 0 < layer["density"] < 1 for layer in report["sparse"]["layers"])
    assert report["dense"]["attention_seconds"] < report["dense"]["time_to_first_token_seconds"]
    assert report["agreement"]["positions"] == 64
    assert report["agreement"]["kl"] >= 0
    assert report["dense"]["found"] is False


def test_keeping_everything_agrees_with_dense_fully(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep_all = ["--set", "ratio_short=1.0", "--set", "decay=1.0"]
    main(["run", "--model", str(tiny_llama), *SPARSE, *keep_all, "--max-new-tokens", "8", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["sparse"]["density"] == 1.0
    assert report["agreement"]["top1"] == 1.0
    assert report["agreement"]["kl"] < 1e-9
    assert report["dense"]["answer"] == report["sparse"]["answer"]


def test_dropping_blocks_changes_the_distributions(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", "--model", str(tiny_llama), *SPARSE, "--policy", "sink-window", "--max-new-tokens", "1", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["policy"] == "sink-window"
    assert report["agreement"]["kl"] > 1e-9


def test_run_reads_a_prompt_file_without_a_planted_fact(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompt.txt").write_text("Tell me about the harbour. " * 10)
    code = main(["run", "--model", str(tiny_llama), "--prompt-file", str(tmp_path / "prompt.txt"), "--max-new-tokens", "2"])
    out = capsys.readouterr().out
    assert code == 0
    assert "planted" not in out
    assert "No layer ran sparse (short prompt)" in out


def test_run_draws_a_png(tiny_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "picture.png"
    main(
        [
            "run",
            "--model",
            str(tiny_llama),
            *SPARSE,
            "--max-new-tokens",
            "1",
            "--plot",
            str(file),
            "--layer",
            "1",
            "--head",
            "3",
        ]
    )
    assert file.read_bytes().startswith(b"\x89PNG")


def test_inspect_shows_picture_and_numbers(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["inspect", "--model", str(tiny_llama), *SPARSE, "--layer", "1", "--head", "0", "--head", "2"])
    out = capsys.readouterr().out
    assert code == 0
    assert "layer 1, head 2" in out
    assert "█" in out
    assert "median distance" in out


def test_inspect_json_lists_the_kept_blocks(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "picture.png"
    assert main(["inspect", "--model", str(tiny_llama), *SPARSE, "--layer", "0", "--json", "--plot", str(file)]) == 0
    report = json.loads(capsys.readouterr().out)
    (view,) = report["views"]
    assert view["kept_blocks"] == sum(len(row) for row in view["blocks"])
    assert all(row[-1] == index for index, row in enumerate(view["blocks"])), "every row keeps its diagonal block"
    assert report["kept_per_row"]["0"] == [len(row) for row in view["blocks"]]
    assert file.read_bytes().startswith(b"\x89PNG")


def test_inspect_writes_every_panel_by_itself(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    panels = tmp_path / "new" / "panels"
    code = main(["inspect", "--model", str(tiny_llama), *SPARSE, "--set", "dense_layers=1", "--json", "--panels", str(panels)])
    report = json.loads(capsys.readouterr().out)
    assert code == 0
    names = {"budget.png", "reach.png", "layer1-head0-kept.png", "layer1-head0-scores.png"}
    assert {file.name for file in panels.iterdir()} == names, "of the layers shown by default, layer 0 is dense"
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in panels.iterdir())
    dense, sparse = report["median_distances"]
    assert dense is None
    assert len(sparse) == 4, "one for each head"
    assert sparse[0] == report["views"][0]["median_distance"]


def test_inspect_names_a_directory_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    assert main(["inspect", "--panels", str(tmp_path / "file")]) == 1
    assert "--panels: cannot make" in capsys.readouterr().err


@pytest.mark.model
@pytest.mark.skipif(embedded_gguf() is None, reason=f"the embedded model is not installed: {EMBEDDED_INSTALL}")
def test_embedded_model_answers_the_planted_question_dense_and_sparse(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(
        ["run", "--context", "1024", "--set", "dense_below=0", "--set", "block_size=64", "--max-new-tokens", "12", "--json"]
    )
    report = json.loads(capsys.readouterr().out)
    assert code == 0
    assert report["dense"]["found"]
    assert report["sparse"]["found"]
    assert report["sparse"]["density"] < 0.9
    assert len(report["sparse"]["layers"]) == 30
