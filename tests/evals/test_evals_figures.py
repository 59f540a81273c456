"""Accuracy against time: what the report joins and draws."""

import pytest

from stem_evals.cost import LayerCost, summary
from stem_evals.details import relative_costs
from stem_evals.journal import open_journal
from stem_evals.report import pareto, write_report
from stem_evals.scores import columns

from .records import DENSITIES, FAMILIES, HEADER, needle

NAMES = ("dense", "stem", "stem@0.1", "oracle@stem")
TIMES = {"dense": 10.0, "stem": 3.0, "stem@0.1": 2.0, "oracle@stem": 40.0}


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
    return {part.title: part.content for part in pareto(columns(accuracy), FAMILIES, relative_costs(timed))}


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
    assert (tmp_path / "out" / "small-pareto-time-1024.png").read_bytes().startswith(b"\x89PNG")


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
