"""The frozen study in benchmarks/stress still runs: a model is trained, loaded and asked."""

import importlib
import json
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_a_model_is_trained_and_asked(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    tasks, train, evaluate = (importlib.import_module(f"stress.{name}") for name in ("tasks", "train", "evaluate"))
    out, records = tmp_path / "model", tmp_path / "records.jsonl"
    arguments = ["--size", "tiny", "--device", "cpu", "--tokens", "512", "--lengths", "128,256", "--minutes", "0.5"]
    assert train.main([*arguments, "--log-every", "0", "--samples", "2", "--steps", "2", "--out", str(out)]) == 0
    assert json.loads((out / "stress.json").read_text())["progress"]["steps"] == 2
    capsys.readouterr()
    asked = ["--model", str(out), "--lengths", "256", "--samples", "1", "--device", "cpu", "--records", str(records)]
    assert evaluate.main([*asked, "--policy", "mass"]) == 0
    assert "mass" in capsys.readouterr().out
    found = [json.loads(line) for line in records.read_text().splitlines()]
    assert len(found) == len(tasks.TASKS) * 2
    assert {record["contender"] for record in found} == {"dense", "mass"}
