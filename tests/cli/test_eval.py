"""``stem-attention eval`` and ``report`` from the command line to their files, on a tiny random model."""

import json
import shutil
from pathlib import Path

import pytest

from stem_attention.cli import main
from stem_attention.evaluation.embedded import EMBEDDED_INSTALL, embedded_gguf
from stem_attention.evaluation.perplexity import Perplexity

pytest.importorskip("matplotlib")

SPARSE = "stem:block_size=64,tail_blocks=0"


def command(model: Path, out: Path, *more: str) -> list[str]:
    text = out.parent / "text.txt"
    text.write_text("A long text about nothing at all. " * 150)
    return ["eval", "perplexity", "--model", str(model), "--text", str(text), "--windows", "2", "--lengths", "1500",
            "--policy", SPARSE, "--out", str(out), *more]  # fmt: skip


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run of two measures."""
    out = tmp_path_factory.mktemp("eval") / "run"
    needles = ["--kinds", "single", "--depths", "0.5", "--samples", "1", "--commit", "c0ffee"]
    arguments = command(tiny_llama, out, *needles)
    arguments.insert(2, "needle")
    assert main(arguments) == 0
    return out


def test_run_leaves_records_facts_report_and_pictures(finished: Path) -> None:
    assert [(record["measure"], record["contender"]) for record in records(finished)] == [
        *[("perplexity", "dense"), ("perplexity", SPARSE)] * 2,
        ("needle", "dense"),
        ("needle", SPARSE),
    ]
    dense, sparse, *_ = records(finished)
    assert (dense["kl"], dense["density"]) == (0.0, 1.0)
    assert sparse["kl"] > 0
    assert sparse["density"] < 1
    assert {path.name for path in finished.iterdir()} >= {
        "run.json",
        "report.md",
        "report.html",
        "tiny_llama0-needle-single.png",
    }


def test_facts_are_all_that_is_needed_to_repeat(finished: Path) -> None:
    facts = json.loads((finished / "run.json").read_text())
    (session,) = facts["sessions"]
    assert session["command"].startswith("stem-attention eval perplexity needle --model ")
    assert session["commit"] == "c0ffee"
    assert {"torch", "transformers", "python", "stem-attention"} <= session["versions"].keys()
    assert session["backend"] == "torch"
    assert len(facts["model"]["sha256"]) == len(facts["texts"]["text.txt"]["sha256"]) == 64
    assert facts["dtype"] == "float32"
    assert facts["contenders"][SPARSE]["at"]["1500"]["fields"]["block_size"] == 64
    assert facts["contenders"]["dense"]["family"] == "dense"


def test_same_command_again_runs_nothing_and_more_contenders_are_added(
    finished: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    before = records(out)
    with (out / "records.jsonl").open("a") as file:
        file.write('{"measure": "perpl')
    with monkeypatch.context() as patch:
        patch.delattr(Perplexity, "run")
        assert main(command(tiny_llama, out)) == 0
    assert records(out) == before
    said = " ".join(capsys.readouterr().err.split())
    assert "dropped a half-written last record" in said
    assert "4 of 4 records are there already" in said
    assert main(command(tiny_llama, out, "--policy", "sink-window:block_size=64,window_blocks=3")) == 0
    assert [record["contender"] for record in records(out)[len(before) :]] == ["sink-window:block_size=64,window_blocks=3"] * 2
    assert len(json.loads((out / "run.json").read_text())["sessions"]) == 3


def test_directory_of_another_text_is_refused(
    finished: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    arguments = command(tiny_llama, out)
    (tmp_path / "text.txt").write_text("Another text about something. " * 200)
    assert main(arguments) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "texts.text.txt.sha256" in line
    assert "choose another directory" in line


def test_interrupted_run_leaves_its_records_and_a_report(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = Perplexity.run, []

    def interrupted(self, case, what, watcher) -> dict:
        calls.append(case.key)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(self, case, what, watcher)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Perplexity, "run", interrupted)
        assert main(command(tiny_llama, out)) == 130
    assert len(records(out)) == 2
    assert "| text.txt | 1500 | dense |" in (out / "report.md").read_text()
    assert main(command(tiny_llama, out)) == 0
    assert len(records(out)) == 4


def test_report_joins_directories(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    shutil.copytree(finished, other)
    assert main(["report", str(finished), str(other), "--out", str(tmp_path / "joined")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "joined" / "report.md")
    assert "| records | 6 |" in (tmp_path / "joined" / "report.md").read_text()
    (other / "report.md").unlink()
    assert main(["report", str(other)]) == 0
    assert (other / "report.md").exists()


def window_row(report: Path) -> list[str]:
    """Cells about the sparse contender's windows, without their seconds."""
    row = next(line for line in report.read_text().splitlines() if line.startswith(f"| text.txt | 1500 | {SPARSE}"))
    *cells, _, windows = (cell.strip() for cell in row.strip("|").split("|"))
    return [*cells, windows]


def test_parts_of_a_run_join_to_the_report_of_the_whole(
    finished: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [tmp_path / "first", tmp_path / "second"]
    for index, out in enumerate(parts, 1):
        assert main(command(tiny_llama, out, "--part", f"{index}/2")) == 0
        assert f"part {index}/2: 1 of 2 cases" in capsys.readouterr().err
    assert [[record["contender"] for record in records(out)] for out in parts] == [["dense", SPARSE]] * 2
    assert main(["report", *map(str, parts), "--out", str(tmp_path / "joined")]) == 0
    joined, whole = (window_row(out / "report.md") for out in (tmp_path / "joined", finished))
    assert joined == whole
    assert joined[-1] == "2"


def test_cost_joins_what_another_directory_says_about_accuracy(finished: Path, tiny_llama: Path, tmp_path: Path) -> None:
    timed = tmp_path / "timed"
    arguments = command(tiny_llama, timed, "--policy", "flashprefill-topk:block_size=64,tail_blocks=0")
    arguments[1] = "cost"
    assert main(arguments) == 0
    assert len(records(timed)) == 2 * 3
    assert main(["report", str(finished), str(timed), "--out", str(tmp_path / "joined")]) == 0
    report = (tmp_path / "joined" / "report.md").read_text()
    (heads,) = (line for line in report.splitlines() if line.startswith("| tokens | contender | density | time over dense |"))
    assert "perplexity over dense, text.txt" in heads
    assert f"| 1500 | {SPARSE} | " in report.split("### Attention time of a prompt")[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["magic"], "MEASURE: expected some of perplexity, needle, layers, cost, stress, ruler, longbench, got magic"),
        (["perplexity", "--policy", "magic"], "policy: expected one of dense"),
        (["perplexity", "--study", "magic"], "study: expected one of"),
        (["perplexity", "--lengths", "9000"], "--lengths: expected at most 4096"),
        (["perplexity", "--lengths", "12x"], "--lengths: expected numbers"),
        (["perplexity", "--windows", "0"], "--windows: expected an integer >= 1"),
        (["perplexity", "--text", "absent.txt"], "--text: cannot read absent.txt"),
        (["needle", "--depths", "deep"], "--depths: expected numbers"),
        (["needle", "--depths", "2"], "depths: expected numbers from 0 to 1"),
        (["needle", "--kinds", "magic"], "kinds: expected among single"),
        (["needle", "--lengths", "100"], "for the question alone"),
        (["perplexity", "--part", "0/8"], "--part: expected I/N with I from 1 to N such as 2/8, got '0/8'"),
        (["perplexity", "--part", "9/8"], "--part: expected I/N"),
        (["perplexity", "--part", "x"], "--part: expected I/N"),
        (["perplexity", "--part", "1/2/3"], "--part: expected I/N"),
        (["needle", "--haystack", "absent.txt"], "--haystack: cannot read absent.txt"),
        (["stress", "ruler", "--tasks", "recall"], "--tasks: expected only one of"),
        (["stress"], "stress needs its own model"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], says: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["eval", *arguments, "--model", str(tiny_llama), "--out", "run"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("stem-attention: ")
    assert says in line
    assert not (tmp_path / "run").exists()


def test_mistakes_of_report_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 1
    assert "made by stem-attention eval" in capsys.readouterr().err.splitlines()[-1]
    assert main(["report", str(tmp_path), str(tmp_path)]) == 1
    assert "--out: expected a directory" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.model
@pytest.mark.skipif(embedded_gguf() is None, reason=f"the embedded model is not installed: {EMBEDDED_INSTALL}")
def test_embedded_model_finds_a_needle_and_predicts_code(tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["--lengths", "700", "--windows", "1", "--kinds", "single", "--depths", "0.5", "--samples", "1"]
    assert main(["eval", "perplexity", "needle", *arguments, "--policy", "sink-window@0.9", "--out", str(out)]) == 0
    dense = {record["measure"]: record for record in records(out) if record["contender"] == "dense"}
    assert dense["needle"]["found"]
    assert 3 < dense["perplexity"]["perplexity"] < 30
