"""``stem-evals eval`` and ``report`` from the command line to their files, on a tiny random model."""

import json
import shutil

import pytest
import torch
from tests.toys import save, toy

from stem_attention.models.load import EMBEDDED_INSTALL, embedded_gguf
from stem_evals.cli.app import main
from stem_evals.perplexity import Perplexity

SPARSE = "stem:block_size=64,tail_blocks=0"


def command(model, out, *more):
    text = out.parent / "text.txt"
    text.write_text("A long text about nothing at all. " * 150)
    return ["eval", "perplexity", "--model", str(model), "--text", str(text), "--windows", "2", "--lengths", "1500",
            "--policy", SPARSE, "--out", str(out), *more]  # fmt: skip


def cells(report):
    """Rows of all tables."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in report.splitlines() if line.startswith("|")]


def records(out):
    return [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tiny_llama, tmp_path_factory):
    """Directory of a run of two measures."""
    out = tmp_path_factory.mktemp("eval") / "run"
    needles = ["--kinds", "single", "--depths", "0.5", "--samples", "1", "--commit", "c0ffee"]
    arguments = command(tiny_llama, out, *needles)
    arguments.insert(2, "needle")
    assert main(arguments) == 0
    return out


def test_run_leaves_records_report_pictures_and_all_facts_that_are_needed_to_repeat(finished):
    ran = [(record["measure"], record["contender"]) for record in records(finished)]
    assert ran == [(measure, name) for measure in ("perplexity", "perplexity", "needle") for name in ("dense", SPARSE)]
    dense, sparse, *_ = records(finished)
    assert (dense["kl"], dense["density"]) == (0.0, 1.0)
    assert sparse["kl"] > 0
    assert sparse["density"] < 1
    assert {path.name for path in finished.iterdir()} >= {"run.json", "report.md", "tiny_llama0-needle-single.png"}
    facts = json.loads((finished / "run.json").read_text())
    (session,) = facts["sessions"]
    assert session["command"].startswith("stem-evals eval perplexity needle --model ")
    assert (session["commit"], session["backend"], facts["dtype"]) == ("c0ffee", "torch", "float32")
    assert {"torch", "transformers", "python", "stem-attention"} <= session["versions"].keys()
    assert len(facts["model"]["sha256"]) == len(facts["texts"]["text.txt"]["sha256"]) == 64
    assert facts["contenders"][SPARSE]["at"]["1500"]["fields"]["block_size"] == 64
    assert facts["contenders"]["dense"]["family"] == "dense"


def test_same_command_again_runs_nothing_and_more_contenders_are_added(finished, tiny_llama, tmp_path, monkeypatch, capsys):
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


def test_parts_of_a_run_join_to_the_report_of_the_whole(finished, tiny_llama, tmp_path, capsys):
    parts = [tmp_path / "first", tmp_path / "second"]
    for index, out in enumerate(parts, 1):
        assert main(command(tiny_llama, out, "--part", f"{index}/2", "--policy", "stem@0.01")) == 0
        said = capsys.readouterr().err
        assert f"part {index}/2: 1 of 2 cases" in said
        assert "stem@0.01 is left out at 1500 tokens" in said
    assert [[record["contender"] for record in records(out)] for out in parts] == [["dense", SPARSE]] * 2
    assert main(["report", *map(str, parts), "--out", str(tmp_path / "joined")]) == 0
    tables = [cells((out / "report.md").read_text()) for out in (tmp_path / "joined", finished)]
    joined, whole = (next(row for row in table if row[:3] == ["text.txt", "1500", SPARSE]) for table in tables)
    assert (joined[:-2], joined[-1]) == (whole[:-2], "2")  # the cell before the last has their seconds
    assert capsys.readouterr().out.endswith(f"wrote {tmp_path / 'joined' / 'report.md'}\n")
    (parts[0] / "report.md").unlink()
    assert main(["report", str(parts[0])]) == 0
    assert (parts[0] / "report.md").exists(), "of one directory in itself"


def test_cost_joins_what_another_directory_says_about_accuracy(finished, tiny_llama, tmp_path):
    timed = tmp_path / "timed"
    arguments = command(tiny_llama, timed, "--policy", "flashprefill-topk:block_size=64,tail_blocks=0")
    arguments[1] = "cost"
    assert main(arguments) == 0
    assert len(records(timed)) == 2 * 3
    assert main(["report", str(finished), str(timed), "--out", str(tmp_path / "joined")]) == 0
    report = (tmp_path / "joined" / "report.md").read_text()
    row = next(row for row in cells(report) if row[:3] == ["1500", "perplexity over dense, text.txt", SPARSE])
    assert float(row[-1].split()[0].rstrip(",")) > 0  # over dense
    assert ["1500", SPARSE] in [row[:2] for row in cells(report.split("### Attention time of a prompt")[1])]


def test_a_model_that_gives_nan_ends_in_words(tmp_path, capsys):
    broken = toy("llama")
    torch.nn.init.constant_(broken.lm_head.weight, float("nan"))
    assert main(command(save(broken, tmp_path / "broken"), tmp_path / "run")) == 1
    assert "NaN" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["magic"], "MEASURE: expected among perplexity, needle, layers, cost, ruler, longbench, got 'magic'"),
        (["perplexity", "--policy", "magic"], "--policy: expected one of mass"),
        (["perplexity", "--study", "magic"], "--study: expected one of ablation, pareto"),
        (["perplexity", "--lengths", "9000"], "--lengths: expected at most 4096"),
        (["perplexity", "--windows", "0"], "--windows"),
        (["perplexity", "--text", "absent.txt"], "--text: cannot read absent.txt"),
        (["needle", "--depths", "deep"], "--depths: expected numbers with ',' between, got 'deep'"),
        (["needle", "--depths", "2"], "--depths: expected a number from 0 to 1"),
        (["needle", "--kinds", "magic"], "--kinds: expected one of single"),
        (["needle", "--lengths", "100"], "stem-evals: --lengths: expected at least"),
        (["perplexity", "--part", "0/8"], "stem-evals: --part: expected I/N with I from 1 to N, got 0/8"),
        (["perplexity", "--part", "9/8"], "stem-evals: --part: expected I/N with I from 1 to N, got 9/8"),
        (["perplexity", "--part", "1/2/3"], "--part: expected I/N such as 2/8, got '1/2/3'"),
        (["needle", "--haystack", "absent.txt"], "--haystack: cannot read absent.txt"),
        (["ruler", "--data", "."], "--data: expected longbench among the measures"),
        (["ruler", "--tasks", "niah_single_9"], "tasks: expected among niah_multikey_1"),
        (["ruler", "--lengths", "2048"], "at least 4096 tokens"),
    ],
)
def test_mistakes_are_one_line(arguments, says, tiny_llama, tmp_path, monkeypatch, complaint):
    monkeypatch.chdir(tmp_path)
    line = complaint(main, ["eval", *arguments, "--model", str(tiny_llama), "--out", "run"], 1, 2)
    assert line.startswith("stem-evals: ")
    assert says in line
    assert not (tmp_path / "run").exists()


def test_mistakes_of_report_are_one_line(complaint, tmp_path):
    assert "stem-evals: DIR: expected a directory made by stem-evals eval" in complaint(main, ["report", str(tmp_path)], 1)
    assert "option '--out'; see" in complaint(main, ["eval", "perplexity"], 2)
    assert "--out: expected a directory" in complaint(main, ["report", str(tmp_path), str(tmp_path)], 1)


@pytest.mark.model
@pytest.mark.skipif(embedded_gguf() is None, reason=f"the embedded model is not installed: {EMBEDDED_INSTALL}")
def test_embedded_model_finds_a_needle_and_predicts_code(tmp_path):
    out = tmp_path / "run"
    arguments = ["--lengths", "700", "--windows", "1", "--kinds", "single", "--depths", "0.5", "--samples", "1"]
    assert main(["eval", "perplexity", "needle", *arguments, "--policy", "dense", "--out", str(out)]) == 0
    dense = {record["measure"]: record for record in records(out)}
    assert dense["needle"]["found"]
    assert 3 < dense["perplexity"]["perplexity"] < 30


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["bnch"], 2, "Did you mean 'bench'?"),
        (["bench", "--suite", "tfft"], 2, "--suite: expected one of attention"),
        (["bench", "--suite", "tfft"], 2, "did you mean ttft?"),
        (["bench", "--model", "lama-3.1-8b"], 1, "--model: "),
        (["eval", "perplexty"], 1, "did you mean perplexity?"),
        (["eval", "perplexity", "--study", "abltion"], 1, "did you mean ablation?"),
        (["eval", "perplexity", "--policy", "stem:dcay=1"], 2, "did you mean decay?"),
    ],
)  # fmt: skip
def test_a_slip_is_told_what_was_meant(arguments, code, says, tmp_path, complaint):
    out = ["--out", str(tmp_path / "run")] if arguments[0] == "eval" else []
    assert says in complaint(main, [*arguments, *out], code)


@pytest.mark.parametrize(("option", "meant"), [("kinds", "single"), ("tasks", "niah_single_1")])
def test_a_slip_in_a_list_names_its_option(option, meant, tiny_llama, tmp_path, complaint):
    measure = {"kinds": "needle", "tasks": "ruler"}[option]
    arguments = [
        "eval",
        measure,
        "--model",
        str(tiny_llama),
        f"--{option}",
        meant.replace("i", "", 1),
        "--out",
        str(tmp_path / "run"),
    ]
    line = complaint(main, arguments, 1)
    assert f"--{option}: expected" in line
    assert f"did you mean {meant}?" in line


def test_help_groups_commands_and_options(capsys):
    for arguments, groups in (["-h"], ("Speed", "Accuracy")), (["eval", "-h"], ("Needles", "RULER", "Where it runs")):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert all(group in out for group in groups)
