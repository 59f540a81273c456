"""``stem-attention calibrate`` on a tiny random model: a file for its layers and heads, and mistakes in one line."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from stem_attention import StemConfig
from stem_attention.cli import calibrate, main
from stem_attention.evaluation.calibrate import Curves
from stem_attention.evaluation.head_curves import SHARES

SMALL = ["--set", "block_size=16", "--set", "query_pool=4", "--set", "key_pool=4", "--set", "tail_blocks=1"]


def command(model: Path, folder: Path, *more: str) -> list[str]:
    text = folder / "text.txt"
    text.write_text(" ".join(f"{word} {word * word % 97}" for word in range(600)))
    return ["calibrate", "--model", str(model), "--out", str(folder / "heads.json"), "--text", str(text), "--length", "800",
            "--windows", "1", "--needles", "1", "--density", "0.4", *SMALL, *more]  # fmt: skip


@pytest.fixture(scope="module")
def calibrated(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that the command writes."""
    folder = tmp_path_factory.mktemp("calibrate")
    assert main(command(tiny_llama, folder)) == 0
    return folder / "heads.json"


def test_file_is_a_config_for_every_layer_and_head(calibrated: Path) -> None:
    config = StemConfig.from_json(calibrated.read_text())
    assert (config.keep, config.block_size, config.query_pool, config.key_pool) == ("mass", 16, 4, 4)
    assert config.dense_below is None, "what the user set stays, or is open"
    assert config.head_factors is not None
    assert [len(row) for row in config.head_factors] == [4, 4]
    assert len({factor for row in config.head_factors for factor in row}) > 1
    assert sorted(path.name for path in calibrated.parent.iterdir()) == ["heads.json", "text.txt"]


def test_same_command_again_writes_the_same_and_another_seed_something_else(
    calibrated: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "heads.json").write_text("{}")  # replaced
    assert main(command(tiny_llama, tmp_path)) == 0
    assert (tmp_path / "heads.json").read_text() == calibrated.read_text()
    captured = capsys.readouterr()
    said = " ".join(captured.err.split())
    assert captured.out == ""
    found = re.search(rf"wrote {tmp_path / 'heads.json'}: density (\S+) on these prompts, share (\S+)", said)
    assert found is not None
    assert float(found[1]) == pytest.approx(0.4, rel=0.06)  # a tiny model's heads step far from share to share
    assert float(found[2]) == pytest.approx(json.loads(calibrated.read_text())["share"], rel=0.01)
    assert main(command(tiny_llama, tmp_path, "--seed", "1", "--needle-weight", "0", "--set", "dense_below=5")) == 0
    other = StemConfig.from_json((tmp_path / "heads.json").read_text())
    assert other.head_factors != StemConfig.from_json(calibrated.read_text()).head_factors
    assert other.dense_below == 5


@pytest.mark.parametrize(("ours", "theirs", "code"), [(0.05, 0.02, 3), (0.02, 0.05, 0), (0.009, 0.001, 0), (-0.01, -0.02, 0)])
def test_it_says_what_the_file_does_to_other_windows(
    ours: float, theirs: float, code: int, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(calibrate, "learn", lambda *arguments: made_up(2, 4))
    monkeypatch.setattr(
        calibrate,
        "text_losses",
        lambda model, windows, configs: [ours if config.head_factors else theirs for config in configs],
    )
    assert main(command(tiny_llama, tmp_path)) == code
    said = " ".join(capsys.readouterr().err.split())
    lost = f"perplexity {math.expm1(ours):+.2%}, with one share for all heads at that density {math.expm1(theirs):+.2%}"
    assert f"other windows of the texts: {lost}" in said
    assert ("that is a loss" in said) == (code == 3)
    assert StemConfig.from_json((tmp_path / "heads.json").read_text()).head_factors is not None


def made_up(layers: int, heads: int) -> Curves:
    rise = torch.rand(layers, heads, len(SHARES), generator=torch.Generator().manual_seed(0)).double().cumsum(-1)
    return Curves(rise, rise, 1 - 0.9 * rise / rise[..., -1:])


def test_run_takes_the_file(calibrated: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "--model", str(tiny_llama), "--context", "800", "--max-new-tokens", "1", "--json", "--config"]
    for more in ([], ["--preset", "mass"]):
        assert main([*arguments, str(calibrated), "--set", "dense_below=0", *more]) == 3
        report = json.loads(capsys.readouterr().out)
        assert report["config"]["head_factors"] == json.loads(calibrated.read_text())["head_factors"]
        assert 0.2 < report["sparse"]["density"] < 0.7
        assert all(layer["sparse"] for layer in report["sparse"]["layers"])


def test_eval_takes_the_file_with_a_share_of_its_own(calibrated: Path, tiny_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    policies = [f"mass:file={calibrated}", f"mass:file={calibrated},share=90"]
    text, out = calibrated.parent / "text.txt", tmp_path / "run"
    arguments = ["eval", "perplexity", "--model", str(tiny_llama), "--text", str(text), "--windows", "1", "--lengths", "800",
                 "--policy", policies[0], "--policy", policies[1], "--out", str(out)]  # fmt: skip
    assert main(arguments) == 0
    lines = (out / "records.jsonl").read_text().splitlines()
    density = {record["contender"]: record["density"] for record in map(json.loads, lines)}
    assert density[policies[0]] == pytest.approx(0.4, abs=0.1)
    assert density[policies[1]] < density[policies[0]] < density["dense"] == 1
    facts = json.loads((out / "run.json").read_text())
    fields = facts["contenders"][policies[1]]["at"]["800"]["fields"]
    assert fields["head_factors"] == json.loads(calibrated.read_text())["head_factors"]
    assert fields["share"] == 90


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--windows", "0"], "--windows: expected an integer >= 1, got 0"),
        (["--needles", "0"], "--needles: expected an integer >= 1, got 0"),
        (["--needle-weight", "-1"], "--needle-weight: expected a number >= 0, got -1.0"),
        (["--needle-weight", "nan"], "--needle-weight: expected a number >= 0, got nan"),
        (["--needle-weight", "inf"], "--needle-weight: expected a number >= 0, got inf"),
        (["--density", "0"], "--density: expected a number > 0 and < 1, got 0.0"),
        (["--density", "1"], "--density: expected a number > 0 and < 1, got 1.0"),
        (["--density", "nan"], "--density: expected a number > 0 and < 1, got nan"),
        (["--length", "0"], "--length: expected an integer >= 1, got 0"),
        (["--length", "5000"], "--length: expected at most 4096, the model's context, got 5000"),
        (["--length", "60"], "at least"),
        (["--windows", "9"], "text: expected at least 7200 tokens for 9 windows of 800"),
        (["--config", "budget.json"], "--config: expected keep='mass', got 'budget'"),
        (["--set", "beta=0.1"], "beta: expected its default"),
        (["--set", "share=0"], "share: expected a finite number > 0"),
        (["--config", "absent.json"], "--config: cannot read absent.json"),
        (["--text", "absent.txt"], "--text: cannot read absent.txt"),
        (["--text", "text.txt"], "text: expected files of different names"),
        (["--haystack", "absent.txt"], "--haystack: cannot read absent.txt"),
        (["--haystack", "empty.txt"], "haystack: expected a text with sentences"),
        (["--device", "toaster"], "--device: expected"),
        (["--dtype", "int8"], "--dtype: expected"),
        (["--model", "./absent"], "--model: expected a directory, a GGUF file or a hub id"),
        (["--out", "absent/heads.json"], "--out: cannot write absent/heads.json"),
        (["--out", "."], "--out: cannot write .: Is a directory"),
        (["--density", "0.01"], "density: expected a number between 0.1"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing_behind(
    arguments: list[str], says: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibrate, "learn", None)  # all of this is known before the long part
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "budget.json").write_text('{"keep": "budget", "query_pool": 16, "key_pool": 32}')
    given = [part for part in command(tiny_llama, tmp_path) if "--config" not in arguments or part not in SMALL]
    assert main([*given, *arguments]) == 1
    captured = capsys.readouterr()
    (line,) = (line for line in captured.err.splitlines() if line.startswith("stem-attention: "))
    assert says in line
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["budget.json", "empty.txt", "text.txt"]


def test_a_file_that_was_there_survives_a_mistake(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "heads.json").write_text("mine")
    assert main(command(tiny_llama, tmp_path, "--length", "5000")) == 1
    assert (tmp_path / "heads.json").read_text() == "mine"


def test_model_with_windows_is_refused(tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=257, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, use_sliding_window=True, sliding_window=64, max_window_layers=1,
    )  # fmt: skip
    model = tmp_path / "windows"
    Qwen2ForCausalLM(config).save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((tiny_llama / name).read_bytes())
    assert main(command(model, tmp_path)) == 1
    assert "calibrate compares full causal attention" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "heads.json").exists()


def test_out_must_be_named(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "--model", str(tiny_llama)]) == 2
    assert "--out" in capsys.readouterr().err
