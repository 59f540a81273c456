"""Records on disk: what a killed run leaves, and what another run may add to."""

import copy
import json
import signal
import subprocess
import sys
import time

import pytest
from tests.toys import listening

from stem_evals.cli.app import main
from stem_evals.journal import differences, open_journal, read_journal

from .records import HEADER, changed

FIELDS = ("contenders", "stem", "at", "1024", "fields")


def record(case, contender="stem", **more):
    return {"measure": "needle", "case": case, "contender": contender, "tokens": 1024, **more}


def test_records_are_on_disk_at_once_and_found_again(tmp_path):
    journal = open_journal(tmp_path / "new" / "run", HEADER)
    journal.add(record("a", share=0.5))
    again = open_journal(tmp_path / "new" / "run", HEADER)
    assert again.records == [record("a", share=0.5)]
    assert again.has("needle", "a", "stem")
    assert not again.has("needle", "a", "dense")
    assert not again.dropped
    assert len(again.header["sessions"]) == 2


@pytest.mark.parametrize("tail", ['{"measure": "need', '{"measure": "needle", "case": "b", "contender": "stem"}'])
def test_half_written_last_line_is_dropped_and_the_next_record_is_whole(tmp_path, tail):
    open_journal(tmp_path, HEADER).add(record("a"))
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write(tail)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert read_journal(tmp_path).dropped
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before, "reading changes nothing"
    journal = open_journal(tmp_path, HEADER)
    assert journal.dropped
    journal.add(record("b"))
    assert [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()] == [record("a"), record("b")]


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (changed("model", "sha256", to="cc"), r"model.sha256 \(aa there, cc here\)"),
        (changed("dtype", to="bfloat16"), r"dtype \(float32 there, bfloat16 here\)"),
        (changed("texts", "austen", "sha256", to="cc"), r"texts.austen.sha256 \(bb there, cc here\)"),
        (changed("settings", "needle", "seed", to=1), r"settings.needle.seed \(0 there, 1 here\)"),
        (changed(*FIELDS, "beta", to=0.3), r"contender stem at 1024 tokens.fields.beta \(0.2 there, 0.3 here\)"),
        (changed(*FIELDS, to={"beta": 0.2, "gamma": 1}), r"fields.gamma \(absent there, 1 here\)"),
    ],
)
def test_directory_of_other_facts_is_refused_and_left_as_it_was(tmp_path, header, says):
    open_journal(tmp_path, HEADER).add(record("a"))
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(ValueError, match=f"{says}.*choose another directory"):
        open_journal(tmp_path, header)
    assert (tmp_path / "run.json").read_bytes() == before


def test_contenders_lengths_texts_and_measures_may_be_added(tmp_path):
    open_journal(tmp_path, HEADER)
    more = copy.deepcopy(HEADER)
    more["contenders"] = {
        "stem": {"family": "stem", "at": {"2048": {"fields": {"beta": 0.2}}}},
        "paper": {"family": "paper", "at": {"1024": {"fields": {}}}},
    }
    more["texts"] = {"code": {"sha256": "dd"}}
    more["settings"] = {"perplexity": {}}
    merged = open_journal(tmp_path, more).header
    assert list(merged["contenders"]["stem"]["at"]) == ["1024", "2048"]
    assert set(merged["contenders"]) == {*HEADER["contenders"], "paper"}
    assert set(merged["texts"]) == {"austen", "code"}
    assert set(merged["settings"]) == {"needle", "perplexity"}
    assert differences(merged, HEADER) == differences(merged, more) == []


def test_directory_of_something_else_or_with_damage_in_the_middle_is_refused(tmp_path):
    with pytest.raises(ValueError, match="made by stem-evals eval"):
        read_journal(tmp_path / "absent")
    (tmp_path / "records.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="run.json"):
        open_journal(tmp_path, HEADER)
    open_journal(tmp_path / "run", HEADER)
    (tmp_path / "run" / "records.jsonl").write_text('{"measure"\n' + json.dumps(record("a")) + "\n")
    with pytest.raises(ValueError, match="damaged line 1"):
        open_journal(tmp_path / "run", HEADER)


def measured(out):
    found = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in found]


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(("kind", "code"), [("SIGINT", 130), ("SIGKILL", -9)])
def test_a_stopped_eval_keeps_whole_records_and_goes_on(kind, code, tiny_llama, tmp_path, capsys):
    out, records, text = tmp_path / "run", tmp_path / "run" / "records.jsonl", tmp_path / "text.txt"
    text.write_text("A long text about nothing at all. " * 150)
    policies = ["--policy", "mass:block_size=32", "--policy", "sink-window:block_size=32,window_blocks=3"]
    command = ["eval", "perplexity", "--model", str(tiny_llama), "--text", str(text), "--windows", "6", "--lengths", "800",
               *policies, "--out"]  # fmt: skip
    assert main([*command, str(tmp_path / "whole")]) == 0
    whole, end = measured(tmp_path / "whole"), time.monotonic() + 240
    stoppable = [sys.executable, "-c", listening("stem_evals.cli.app"), *command, str(out)]
    process = subprocess.Popen(stoppable, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not records.exists() or records.read_bytes().count(b"\n") < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.Signals[kind])
    _, err = process.communicate(timeout=240)
    assert (process.returncode, "Traceback" in err) == (code, False), err
    kept = [line for line in records.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    assert 2 <= len(kept) < len(whole)
    if kind == "SIGINT":
        assert err.splitlines()[-1] == "stem-evals: interrupted"
        assert records.read_bytes().endswith(b"\n")
        assert "perplexity over dense, text.txt" in (out / "report.md").read_text()
    capsys.readouterr()
    assert main([*command, str(out)]) == 0
    assert f"{len(kept)} of {len(whole)} records are there already" in " ".join(capsys.readouterr().err.split())
    assert records.read_bytes().splitlines(keepends=True)[: len(kept)] == kept
    assert measured(out) == whole
