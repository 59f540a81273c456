"""Records on disk: what a killed run leaves, and what another run may add to."""

import copy
import json
from pathlib import Path

import pytest

from stem_attention.evaluation.journal import differences, open_journal, read_journal

HEADER = {
    "format": 1,
    "model": {"name": "m", "sha256": "aa"},
    "dtype": "float32",
    "device": "cpu",
    "texts": {"austen": {"sha256": "bb"}},
    "settings": {"needle": {"seed": 0}},
    "contenders": {"stem": {"family": "stem", "at": {"1024": {"fields": {"beta": 0.2}}}}},
    "sessions": [{"command": "first"}],
}


def record(case: str, contender: str = "stem", **more: object) -> dict[str, object]:
    return {"measure": "needle", "case": case, "contender": contender, "tokens": 1024, **more}


def changed(*path: str, to: object) -> dict[str, object]:
    header = copy.deepcopy(HEADER)
    place = header
    for name in path[:-1]:
        place = place[name]  # type: ignore[assignment]
    place[path[-1]] = to  # type: ignore[index]
    return header


def test_records_are_on_disk_at_once_and_found_again(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "new" / "run", HEADER)
    journal.add(record("a", share=0.5))
    again = open_journal(tmp_path / "new" / "run", HEADER)
    assert again.records == [record("a", share=0.5)]
    assert again.has("needle", "a", "stem")
    assert not again.has("needle", "a", "dense")
    assert not again.dropped
    assert len(again.header["sessions"]) == 2


@pytest.mark.parametrize("tail", ['{"measure": "need', '{"measure": "needle", "case": "b", "contender": "stem"}'])
def test_half_written_last_line_is_dropped_and_the_next_record_is_whole(tmp_path: Path, tail: str) -> None:
    open_journal(tmp_path, HEADER).add(record("a"))
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write(tail)
    assert read_journal(tmp_path).dropped
    journal = open_journal(tmp_path, HEADER)
    assert journal.dropped
    journal.add(record("b"))
    assert [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()] == [record("a"), record("b")]


def test_reading_changes_nothing(tmp_path: Path) -> None:
    open_journal(tmp_path, HEADER).add(record("a"))
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write("half")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    read_journal(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (changed("model", "sha256", to="cc"), r"model.sha256 \(aa there, cc here\)"),
        (changed("dtype", to="bfloat16"), r"dtype \(float32 there, bfloat16 here\)"),
        (changed("texts", "austen", "sha256", to="cc"), r"texts.austen.sha256 \(bb there, cc here\)"),
        (changed("settings", "needle", "seed", to=1), r"settings.needle.seed \(0 there, 1 here\)"),
        (
            changed("contenders", "stem", "at", "1024", "fields", "beta", to=0.3),
            r"contender stem at 1024 tokens.fields.beta \(0.2 there, 0.3 here\)",
        ),
        (
            changed("contenders", "stem", "at", "1024", "fields", to={"beta": 0.2, "gamma": 1}),
            r"fields.gamma \(absent there, 1 here\)",
        ),
    ],
)
def test_directory_of_other_facts_is_refused_and_left_as_it_was(tmp_path: Path, header: dict, says: str) -> None:
    open_journal(tmp_path, HEADER).add(record("a"))
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(ValueError, match=says):
        open_journal(tmp_path, header)
    assert (tmp_path / "run.json").read_bytes() == before


def test_contenders_lengths_texts_and_measures_may_be_added(tmp_path: Path) -> None:
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
    assert set(merged["contenders"]) == {"stem", "paper"}
    assert set(merged["texts"]) == {"austen", "code"}
    assert set(merged["settings"]) == {"needle", "perplexity"}
    assert differences(merged, HEADER) == differences(merged, more) == []


def test_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="made by stem-attention eval"):
        read_journal(tmp_path / "absent")
    (tmp_path / "records.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="run.json"):
        open_journal(tmp_path, HEADER)


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    open_journal(tmp_path, HEADER)
    (tmp_path / "records.jsonl").write_text('{"measure"\n' + json.dumps(record("a")) + "\n")
    with pytest.raises(ValueError, match="damaged line 1"):
        open_journal(tmp_path, HEADER)
