"""bench --suite ttft: what it prints, as table, JSON and picture."""

import json
from pathlib import Path

import pytest
import torch

from stem_attention.cli import main
from stem_attention.integrations import transformers as integration

pytest.importorskip("transformers")

TINY = ["bench", "--suite", "ttft", "--model", "tiny", "--repeats", "1", "--set", "dense_below=0"]


def test_table_says_who_took_how_long_and_what_was_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--lengths", "700,300"]) == 0
    out = capsys.readouterr().out
    for part in ("tiny, 2 layers, float32", "300", "700", "SDPA", "Stem", "attention", "MLP", "ratio", "every block kept"):
        assert part in out


def test_json_and_picture_hold_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "ttft.png"
    threads = torch.get_num_threads()
    try:
        assert main([*TINY, "--lengths", "300,900", "--threads", "1", "--json", "--plot", str(file)]) == 0
    finally:
        torch.set_num_threads(threads)
    report = json.loads(capsys.readouterr().out)
    assert (report["model"], report["layers"], report["head_dim"], report["threads"]) == ("tiny", 2, 16, 1)
    assert [result["length"] for result in report["results"]] == [300, 900]
    for result in report["results"]:
        assert result["timings"].keys() == {"SDPA", "Stem"}
        assert result["ratios"].keys() == {"total", "attention"}
    assert report["check"]["Stem"]["attention"] < 1e-5
    assert file.read_bytes().startswith(b"\x89PNG")


def test_first_calls_are_made_in_new_processes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--lengths", "300", "--first-call", "--no-dense", "--json"]) == 0
    calls = json.loads(capsys.readouterr().out)["first_call"]
    assert calls.keys() == {"Stem, empty cache", "Stem, filled cache"}
    assert all(call["first"] > 0 and call["second"] > 0 for call in calls.values())


def test_a_wrong_result_prints_no_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = integration.stem_attention
    monkeypatch.setattr(integration, "stem_attention", lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
    assert main([*TINY, "--lengths", "300"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "wrong result at 300 tokens" in captured.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "gemma"], "--model: expected one of llama-3.1-8b, qwen3-8b"),
        (["--heads", "4"], "--heads, --kv-heads, --head-dim: suite ttft runs whole models"),
        (["--repeats", "0"], "--repeats: expected an integer >= 1"),
        (["--lengths", "8k"], "--lengths: expected numbers of tokens"),
    ],
)
def test_bad_option_is_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert says in captured.err
