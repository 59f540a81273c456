"""The report: from records to Markdown and pictures, accuracy against density and time among them."""

import re
from pathlib import Path

import pytest

from stem_evals import details
from stem_evals.cost import LayerCost, summary
from stem_evals.journal import Journal, open_journal, read_journal
from stem_evals.report import gather, pareto, write_report
from stem_evals.scores import columns

from .records import DENSITIES, FAMILIES, HEADER, changed, needle, perplexity

RESULTS = Path(__file__).parents[2] / "evidence" / "eval"
CONTENDERS = ("dense", "stem", "uniform@stem", "uniform@0.5")
NAMES = ("dense", "stem", "stem@0.1", "oracle@stem")
TIMES = {"dense": 10.0, "stem": 3.0, "stem@0.1": 2.0, "oracle@stem": 40.0}


@pytest.fixture
def journal(tmp_path):
    journal = open_journal(tmp_path / "run", HEADER)
    for sample in range(12):
        for name in CONTENDERS:
            journal.add(needle(name, sample, float(name != "stem")))
    for start in range(3):
        for name in CONTENDERS:
            journal.add(perplexity(name, start, 2.0 + (1 - DENSITIES[name]) * (0.1 + start / 1000)))
    return journal


def rows(report, title):
    """Cells of the table under a heading."""
    lines = report.split(f"### {title}", 1)[1].split("###", 1)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")][2:]


def test_report_says_who_is_best_with_density_n_and_intervals_and_has_its_pictures(journal, tmp_path):
    write_report([journal], tmp_path / "out")
    report = (tmp_path / "out" / "report.md").read_text()
    best = rows(report, "Best at equal density (within 5%)")
    assert [row[4:5] + row[6:7] + row[9:] for row in best] == [["uniform@stem", "stem", "clear"]] * 2
    found = {(row[1], row[2]): row for row in rows(report, "Against dense")}
    stem = found["numbers found, single", "stem"]
    assert stem[3:7] == ["sparse", "0.300", "12", "0.0% [0.0%, 24.2%]"]
    assert stem[7].startswith("-100.0 [")
    assert found["numbers found, single", "dense"][7] == ""
    assert re.fullmatch(r"1\.07\d\d \[1\.07\d\d, 1\.07\d\d\]", found["perplexity over dense, austen", "stem"][6])
    assert [row[2] for row in rows(report, "Whole windows")] == list(CONTENDERS)
    assert [row[2] for row in rows(report, "Perplexity over dense, by position")] == list(CONTENDERS)[1:]
    names = re.findall(r"!\[.*?\]\((.*?)\)", report)
    assert names == ["small-pareto-1024.png", "small-needle-single.png"]
    assert all((tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_needles_are_drawn_by_depth_and_length_as_far_as_each_contender_got(tmp_path):
    records = [needle("dense"), needle("dense", 1, 0.0, depth=1.0, places=[0.9]), needle("stem", share=0.0)]
    (part,) = details.needle([*records, needle("dense", 2, tokens=2048)])
    panels = part.content.axes
    assert [axes.get_title() for axes in panels] == ["dense", "stem"]
    assert [[text.get_text() for text in axes.texts] for axes in panels] == [["100%", "100%", "0%", ""], ["0%", "", "", ""]]
    assert [label.get_text() for label in panels[1].get_yticklabels()] == ["0.5", "1"]
    assert [label.get_text() for label in panels[1].get_xticklabels()] == ["1K", "2K"]


def test_several_directories_become_one_report(journal, tmp_path):
    other = open_journal(tmp_path / "other", HEADER)
    other.add(needle("stem"))  # in both: the first directory's counts
    other.add(needle("stem", 100))
    third = open_journal(tmp_path / "third", changed("model", to={"name": "large", "sha256": "cc", "revision": None}))
    third.add(needle("stem"))
    chapters = gather([journal, other, third])
    assert [(chapter.title, len(chapter.records)) for chapter in chapters] == [("small", 61), ("large", 1)]
    write_report([journal, other, third], tmp_path / "out")
    report = (tmp_path / "out" / "report.md").read_text()
    assert {(row[1], row[2]): row[5] for row in rows(report, "Against dense")}["numbers found, single", "stem"] == "13"
    assert "## large" in report


def test_directories_that_contradict_each_other_are_refused(journal, tmp_path):
    other = changed("contenders", "stem", "at", "1024", "density", to=0.4)
    with pytest.raises(ValueError, match="contender stem at 1024 tokens.density"):
        gather([journal, open_journal(tmp_path / "other", other)])
    assert len(gather([journal, open_journal(tmp_path / "moved", changed("device", to="another"))])) == 1


def test_text_is_escaped_where_it_has_a_meaning(tmp_path):
    journal = open_journal(tmp_path / "odd", changed("model", "name", to="<b>|"))
    journal.add(needle("stem"))
    write_report([journal], tmp_path / "out")
    assert "| <b>\\| " in (tmp_path / "out" / "report.md").read_text()


def test_a_prompt_that_the_machine_would_run_dense_is_named(journal):
    short = changed("sessions", 0, "dense_below", to=4096)
    assert gather([Journal(journal.directory, short, journal.records, False)])[0].note.startswith("Policies were run sparse")
    assert gather([journal])[0].note == ""


@pytest.mark.parametrize(
    ("names", "row"),
    [
        (["qwen-mass-needle-8k"], ["mass", "sparse", "0.246", "977", "94.8% [93.2%, 96.0%]", "-1.4 [-2.7, -0.1]"]),
        (["qwen-ruler-16k"], ["stem", "sparse", "0.343", "25", "40.0% [23.4%, 59.3%]", "+17.6 [-2.2, +34.8]"]),
        (["stress-mass-32k"], ["stem", "sparse", "0.180", "16", "31.2% [14.2%, 55.6%]", "-68.8 [-88.4, -33.8]"]),
        (["qwen-table1-8k"], ["stem", "sparse", "0.370", "2", "0.0947 [-0.0044, 0.1938]", "+0.0947 [-0.0044, +0.1938]"]),
        (
            ["qwen-pareto-32k", "qwen-pareto-cost-32k"],
            ["stem", "sparse", "0.180", "3", "1.0390 [1.0314, 1.0467]", "+3.90 [+3.14, +4.67]", "0.209 [0.205, 0.212]"],
        ),
    ],
)
def test_old_records_are_read_as_the_pages_show_them(names, row):
    (chapter,) = gather([read_journal(RESULTS / name) for name in names])
    assert row in chapter.scores.iloc[:, 2:].to_numpy().tolist()


def layer(name, seconds):
    if name == "dense":
        return LayerCost(1.0, 0.0, seconds, seconds, True, {"fast": seconds})
    return LayerCost(DENSITIES[name], seconds / 2, seconds / 2, seconds, name != "oracle@stem")


def costs(tokens=1024, names=NAMES):
    about = {"measure": "cost", "case": f"text-{tokens}-0", "tokens": tokens, "device": "card"}
    return [{**about, "contender": name, **summary([layer(name, TIMES[name] / 1e3)])} for name in names]


def needles(tokens=1024):
    return [needle(name, sample, tokens=tokens) for sample in range(4) for name in NAMES]


def figures(accuracy, timed):
    return {part.title: part.content for part in pareto(columns(accuracy), FAMILIES, details.relative_costs(timed))}


def drawn(figure):
    """Places of all points of the first panel by family, and of the hollow ones."""
    axes, *_ = figure.axes
    lines = {container.get_label(): list(container.lines[0].get_xdata()) for container in axes.containers}
    hollow = [x for line in axes.lines if line.get_markerfacecolor() == "white" for x in line.get_xdata()]
    return lines, hollow


def test_a_point_stands_at_its_density_or_at_its_time_over_denses_and_is_hollow_where_eager_torch_chose():
    made = figures(needles(), costs())
    assert list(made) == ["pareto-1024", "pareto-time-1024"]
    lines, hollow = drawn(made["pareto-time-1024"])
    assert lines == {"stem": pytest.approx([0.2, 0.3]), "oracle": pytest.approx([4.0])}
    assert hollow == pytest.approx([4.0])
    axes = made["pareto-time-1024"].axes[0]
    assert axes.get_xscale() == "log"
    assert any(list(line.get_xdata()) == [1.0, 1.0] for line in axes.lines)
    legend = [text.get_text() for text in made["pareto-time-1024"].legends[0].get_texts()]
    assert {"dense", "stem", "oracle", "as fast as dense", "hollow: selection in eager torch"} == set(legend)
    mixed = [{**one, "fused": one["contender"] == "stem@0.1"} for one in costs()]
    lines, hollow = drawn(figures(needles(), mixed)["pareto-time-1024"])
    assert lines["stem"] == pytest.approx([0.2, 0.3])
    assert sorted(hollow) == pytest.approx([0.3, 4.0])
    lines, hollow = drawn(made["pareto-1024"])
    assert lines == {"stem": [0.1, 0.3], "oracle": [0.3]}
    assert hollow == []
    assert "hollow" not in str([text.get_text() for text in made["pareto-1024"].legends[0].get_texts()])


def test_times_are_joined_by_contender_and_length():
    assert list(figures(needles(2048), costs(1024))) == ["pareto-2048"]
    assert list(figures(needles(), costs(names=("dense", "stem")))) == ["pareto-1024"]  # one point is no picture
    lines, _ = drawn(figures(needles(), costs(names=("dense", "stem", "oracle@stem")))["pareto-time-1024"])
    assert lines == {"stem": pytest.approx([0.3]), "oracle": pytest.approx([4.0])}
    assert list(figures(needles(), costs(names=("stem", "oracle@stem")))) == ["pareto-1024"]  # nothing to relate them to


def test_accuracy_and_cost_of_two_directories_become_one_picture(tmp_path):
    journals = [open_journal(tmp_path / name, HEADER) for name in ("accuracy", "cost")]
    for journal, records in zip(journals, (needles(), costs()), strict=True):
        for record in records:
            journal.add(record)
    for some, pictures in ((journals, 1), (journals[1:], 0)):
        write_report(some, tmp_path / "out")
        report = (tmp_path / "out" / "report.md").read_text()
        assert report.count("(small-pareto-time-1024.png)") == pictures
        assert "### Attention time of a prompt" in report


def test_a_contender_far_from_all_others_does_not_squeeze_them():
    records = [
        {**one, "case": f"{one['case']}-{lap}", "found": found, "hits": [found], "share": float(found)}
        for lap in range(4)
        for one in needles()
        for found in [one["contender"] == "dense" or (one["contender"] != "stem@0.1" and (lap, one["sample"]) != (0, 0))]
    ]
    axes = figures(records, costs())["pareto-1024"].axes[0]
    low, high = axes.get_ylim()
    assert 90 < low < 93.75 < 100 < high < 110
    assert [text.get_text() for text in axes.texts] == ["beyond: stem (1)"]
    assert not figures(needles(), costs())["pareto-1024"].axes[0].texts
