"""Accuracy against time: what the report joins and draws."""

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from stem_attention.evaluation.cost import LayerCost, summary
from stem_attention.evaluation.cost_report import relative_costs
from stem_attention.evaluation.journal import open_journal
from stem_attention.evaluation.report import write_report
from stem_attention.evaluation.scores import columns
from stem_attention.evaluation.scores_report import pareto_figures, side_by_side

DENSITIES = {"dense": 1.0, "stem": 0.2, "stem@0.1": 0.1, "oracle@stem": 0.2}
FAMILIES = {name: name.partition("@")[0] for name in DENSITIES}
TIMES = {"dense": 10.0, "stem": 3.0, "stem@0.1": 2.0, "oracle@stem": 40.0}
HEADER = {
    "format": 1, "model": {"name": "small", "sha256": "aa", "revision": None}, "dtype": "float32", "device": "card",
    "texts": {}, "settings": {},
    "contenders": {name: {"family": FAMILIES[name], "at": {"1024": {"density": kept}}} for name, kept in DENSITIES.items()},
    "sessions": [{"command": "stem-attention eval", "commit": None, "uncommitted": [], "versions": {"torch": "2"}}],
}  # fmt: skip


def layer(name, seconds):
    if name == "dense":
        return LayerCost(1.0, 0.0, seconds, seconds, True, {"fast": seconds})
    return LayerCost(DENSITIES[name], seconds / 2, seconds / 2, seconds, name != "oracle@stem")


def costs(tokens=1024, names=tuple(DENSITIES)):
    return [
        {
            "measure": "cost", "case": f"text-{tokens}-0", "tokens": tokens, "contender": name, "device": "card",
            **summary([layer(name, TIMES[name] / 1e3)]),
        }
        for name in names
    ]  # fmt: skip


def needles(tokens=1024, names=tuple(DENSITIES)):
    return [
        {
            "measure": "needle", "case": f"single-{tokens}-{sample}", "tokens": tokens, "contender": name, "kind": "single",
            "depth": 0.5, "sample": sample, "planted": ["1"], "places": [0.5], "hits": [True], "found": True, "share": 1.0,
            "density": DENSITIES[name], "seconds": 0.1,
        }
        for sample in range(4)
        for name in names
    ]  # fmt: skip


def figures(accuracy, timed):
    return dict(pareto_figures(columns(accuracy), FAMILIES, relative_costs(timed)))


def drawn(figure):
    """Places of all points of the first panel by family, and of the hollow ones."""
    axes, *_ = figure.axes
    lines = {container.get_label(): list(container.lines[0].get_xdata()) for container in axes.containers}
    hollow = [x for line in axes.lines if line.get_markerfacecolor() == "white" for x in line.get_xdata()]
    return lines, hollow


def test_a_point_stands_at_its_time_over_denses_and_is_hollow_where_eager_torch_chose():
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


def test_a_family_may_have_points_of_both_kinds():
    mixed = [{**one, "fused": one["contender"] == "stem@0.1"} for one in costs()]
    lines, hollow = drawn(figures(needles(), mixed)["pareto-time-1024"])
    assert lines["stem"] == pytest.approx([0.2, 0.3])
    assert sorted(hollow) == pytest.approx([0.3, 4.0])


@pytest.mark.parametrize(("slowest", "ticks"), [(40.0, ["0.2", "0.5", "1", "2"]), (12.0, ["0.2", "0.3", "0.4", "0.5", "0.6"])])
def test_the_axis_has_ticks_for_its_span_and_one_where_dense_stands(slowest, ticks):
    timed = [{**one, "whole_ms": slowest} if one["contender"] == "oracle@stem" else one for one in costs()]
    axes = figures(needles(), timed)["pareto-time-1024"].axes[0]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels[: len(ticks)] == ticks
    assert "1" in labels


def test_against_density_nothing_is_hollow():
    made = figures(needles(), costs())
    lines, hollow = drawn(made["pareto-1024"])
    assert lines == {"stem": [0.1, 0.2], "oracle": [0.2]}
    assert hollow == []
    assert "hollow" not in str([text.get_text() for text in made["pareto-1024"].legends[0].get_texts()])


def test_times_are_joined_by_contender_and_length():
    assert list(figures(needles(2048), costs(1024))) == ["pareto-2048"]
    assert list(figures(needles(), costs(names=("dense", "stem")))) == ["pareto-1024"]  # one point is no picture
    lines, _ = drawn(figures(needles(), costs(names=("dense", "stem", "oracle@stem")))["pareto-time-1024"])
    assert lines == {"stem": pytest.approx([0.3]), "oracle": pytest.approx([4.0])}
    assert list(figures(needles(), costs(names=("stem", "oracle@stem")))) == ["pareto-1024"]  # nothing to relate them to


def test_the_table_of_all_measures_has_the_time_where_there_is_one():
    (table,) = side_by_side(columns(needles()), relative_costs(costs(names=("dense", "stem", "oracle@stem"))))
    assert table.columns[3] == "time over dense"
    assert {row[1]: row[3] for row in table.rows} == {
        "dense": "1.000", "stem": "0.300", "stem@0.1": "", "oracle@stem": "4.000, eager torch",
    }  # fmt: skip
    (without,) = side_by_side(columns(needles()), {})
    assert "time over dense" not in without.columns
    assert all(len(row) == len(without.columns) for row in without.rows)


def test_accuracy_and_cost_of_two_directories_become_one_picture(tmp_path: Path):
    journals = [open_journal(tmp_path / name, HEADER) for name in ("accuracy", "cost")]
    for journal, records in zip(journals, (needles(), costs()), strict=True):
        for record in records:
            journal.add(record)
    write_report(journals, tmp_path / "out")
    report = (tmp_path / "out" / "report.md").read_text()
    assert "small-pareto-time-1024.png" in report
    assert (tmp_path / "out" / "small-pareto-time-1024.png").read_bytes().startswith(b"\x89PNG")
    assert "## small: Cost of attention" in report
    write_report(journals[1:], tmp_path / "alone")
    assert "pareto" not in (tmp_path / "alone" / "report.md").read_text()


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
