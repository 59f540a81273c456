"""The report: from records to Markdown, HTML and pictures."""

import copy
import json
import re
from pathlib import Path

import pytest

from stem_attention.evaluation.journal import Journal, open_journal
from stem_attention.evaluation.measure import Section, Table
from stem_attention.evaluation.render import render_html, render_markdown

pytest.importorskip("matplotlib")

from stem_attention.evaluation.report import gather, write_report

CONTENDERS = {"dense": 1.0, "stem": 0.30, "uniform@stem": 0.31, "uniform@0.5": 0.5}
SESSION = {
    "command": "stem-attention eval needle", "started": "now", "commit": "c0ffee", "uncommitted": [], "threads": 1,
    "versions": {"torch": "2", "python": "3"},
}  # fmt: skip
HEADER = {
    "format": 1, "model": {"name": "small", "sha256": "aa", "revision": None}, "dtype": "float32", "device": "cpu",
    "texts": {"austen": {"sha256": "bb", "characters": 10}}, "settings": {},
    "contenders": {
        name: {"family": name.partition("@")[0], "at": {"1024": {"density": density}}} for name, density in CONTENDERS.items()
    },
    "sessions": [SESSION],
}  # fmt: skip


def needle(contender: str, sample: int, hit: bool) -> dict:
    return {
        "measure": "needle", "case": f"single-1024-0.5-{sample}", "tokens": 1024, "contender": contender, "kind": "single",
        "depth": 0.5, "sample": sample, "planted": ["1"], "places": [0.5], "hits": [hit], "found": hit, "share": float(hit),
        "density": CONTENDERS[contender], "seconds": 0.1,
    }  # fmt: skip


def perplexity(contender: str, start: int, loss: float) -> dict:
    means = {"loss": loss, "dense_loss": 2.0, "kl": abs(loss - 2), "same": 0.9}
    return {
        "measure": "perplexity", "case": f"austen-1024-{start}", "tokens": 1024, "contender": contender, "text": "austen",
        "start": start, "predicted": 1023, **means, "density": CONTENDERS[contender], "seconds": 0.1,
        "buckets": [{"first": 1, "last": 511, **means}, {"first": 512, "last": 1023, **means}],
    }  # fmt: skip


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = open_journal(tmp_path / "run", HEADER)
    for sample in range(12):
        for name in CONTENDERS:
            journal.add(needle(name, sample, name != "stem"))
    for start in range(3):
        for name, density in CONTENDERS.items():
            journal.add(perplexity(name, start, 2.0 + (1 - density) * (0.1 + start / 1000)))
    return journal


def rows(report: str, title: str) -> list[list[str]]:
    """Cells of the table under a heading."""
    lines = report.split(f"### {title}", 1)[1].split("###", 1)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")][2:]


def test_report_says_plainly_who_is_best_at_equal_density(journal: Journal, tmp_path: Path) -> None:
    write_report([journal], tmp_path / "out")
    report = (tmp_path / "out" / "report.md").read_text()
    best = rows(report, "Best at equal density (within 5%)")
    assert [row[4:5] + row[6:7] + row[9:] for row in best] == [["uniform@stem", "stem", "clear"]] * 2
    assert "stem is the best at its density in 0 of 2 rows (clearly in 0) and clearly behind the best in 2." in report


def test_every_table_of_a_measure_gives_density_n_and_intervals(journal: Journal, tmp_path: Path) -> None:
    write_report([journal], tmp_path / "out")
    report = (tmp_path / "out" / "report.md").read_text()
    found = {row[2]: row for row in rows(report, "Numbers found")}
    assert found["stem"][3:6] == ["0.300", "0 of 12", "0% to 24%"]
    assert found["stem"][-1] == "12"
    assert found["dense"][7] == ""
    assert found["stem"][7].startswith("-100.0 [")
    whole = {row[2]: row for row in rows(report, "Whole windows")}
    assert re.fullmatch(r"1\.07\d\d \[1\.07\d\d, 1\.07\d\d\]", whole["stem"][5])
    assert len(rows(report, "Perplexity over dense, by position")) == 3
    assert {row[1]: row[3] for row in rows(report, "All measures")}["stem"].startswith("0.0% [0.0%, 24.2%], n 12")


def test_pictures_lie_beside_the_markdown_and_inside_the_html(journal: Journal, tmp_path: Path) -> None:
    write_report([journal], tmp_path / "out")
    names = re.findall(r"!\[.*?\]\((.*?)\)", (tmp_path / "out" / "report.md").read_text())
    assert names == ["small-pareto-1024.png", "small-needle-single.png", "small-perplexity-austen-1024.png"]
    assert all((tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG") for name in names)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("src='data:image/png;base64,") == 3
    assert "http" not in page


def test_several_directories_become_one_report(journal: Journal, tmp_path: Path) -> None:
    other = open_journal(tmp_path / "other", HEADER)
    other.add(needle("stem", 0, True))  # in both: the first directory's counts
    other.add(needle("stem", 100, True))
    third = open_journal(tmp_path / "third", {**HEADER, "model": {"name": "large", "sha256": "cc", "revision": None}})
    third.add(needle("stem", 0, True))
    chapters = gather([journal, other, third])
    assert [(chapter.title, len(chapter.records)) for chapter in chapters] == [("small", 61), ("large", 1)]
    write_report([journal, other, third], tmp_path / "out")
    report = (tmp_path / "out" / "report.md").read_text()
    assert {row[2]: row[4] for row in rows(report, "Numbers found")}["stem"] == "1 of 13"
    assert "## large: Needles" in report


def test_directories_that_contradict_each_other_are_refused(journal: Journal, tmp_path: Path) -> None:
    changed = copy.deepcopy(HEADER)
    changed["contenders"]["stem"]["at"]["1024"]["density"] = 0.4
    with pytest.raises(ValueError, match="contender stem at 1024 tokens.density"):
        gather([journal, open_journal(tmp_path / "other", changed)])
    moved = json.loads(json.dumps({**HEADER, "device": "another"}))
    assert len(gather([journal, open_journal(tmp_path / "moved", moved)])) == 1


def test_text_is_escaped_where_it_has_a_meaning() -> None:
    sections = [Section("A & B", (Table("a", ("<x>",), (("p|q",), ("line\nbreak",)), "note <b>"),))]
    assert "| p\\|q |\n| line break |" in render_markdown("T", sections)
    page = render_html("T", sections, Path())
    assert "<th>&lt;x&gt;</th>" in page
    assert "note &lt;b&gt;" in page
    assert "<h2>A &amp; B</h2>" in page
