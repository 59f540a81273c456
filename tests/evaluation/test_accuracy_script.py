"""benchmarks/accuracy.py from its command line to its files, on a tiny random model."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from stem_attention import StemConfig
from stem_attention.policies import SinkWindow, UniformTopK

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "accuracy.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("accuracy_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def saved(model, tokenizer, tmp_path: Path) -> str:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_result_holds_the_numbers_and_what_repeats_them(
    script, saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("A long text about nothing. " * 200)
    arguments = ["--model", saved, "--tokens", "2200", "--text", str(tmp_path / "text.txt")]
    arguments += ["--policies", "stem,sink-window", "--needle-policies", "dense,stem", "--depths", "0.5", "--per-depth", "1"]
    arguments += ["--json", str(tmp_path / "new" / "result.json"), "--lines", str(tmp_path / "lines.jsonl")]
    assert script.main(arguments) == 0
    result = json.loads((tmp_path / "new" / "result.json").read_text())

    assert [row["name"] for row in result["perplexity"]] == ["dense", "stem", "sink-window"]
    dense, stem, window = result["perplexity"]
    assert (dense["kl"], dense["top1"], dense["density"]) == (0, 1, 1)
    assert min(stem["kl"], window["kl"]) > 0
    assert max(stem["density"], window["density"]) < 1
    assert [(row["name"], row["trials"]) for row in result["needle"]["summary"]] == [("dense", 1), ("stem", 1)]

    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert lines == [*result["perplexity"], *result["needle"]["trials"]]
    assert result["policies"]["stem"] == {"policy": "stem", **StemConfig(dense_below=0).to_dict()}
    assert result["text"]["tokens"] == 2200
    assert len(result["model"]["sha256"]) == len(result["text"]["sha256"]) == 64
    assert len(result["commit"]) == 40
    assert result["command"].startswith("python benchmarks/accuracy.py --model")
    assert "| sink-window |" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "kind"), [("uniform", UniformTopK), ("sink-window", SinkWindow)])
def test_compared_policies_get_the_budget_nearest_to_stem(script, name: str, kind: type) -> None:
    policy = script.make_contender(name, 8192)
    assert isinstance(policy, kind)
    row = script.torch.zeros(1, 8192, 1, 1)
    density = script.make_policy("stem", StemConfig())(row, row, row).density()
    assert policy(row, row, row).density() == pytest.approx(density, abs=0.01)


def test_every_name_makes_a_contender(script) -> None:
    assert all((script.make_contender(name, 2048) is None) == (name == "dense") for name in script.NAMES)


def test_mistakes_are_one_line(script, saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--model", saved, "--tokens", "5000"]) == 1
    assert "tokens: expected at most 4096" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit):
        script.main(["--policies", "dense,nonsense"])
    assert "unknown policies nonsense" in capsys.readouterr().err
