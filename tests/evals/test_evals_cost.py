"""The measure "cost" on a tiny random model: what is timed, what a record says, and what the report makes of it."""

from dataclasses import replace

import pytest
import torch

from stem_attention import UnsupportedError
from stem_attention.models.prefill import AttentionCall, read
from stem_attention.policies import FlashPrefillTopK, Mass, SinkWindow, Stem
from stem_evals import cost
from stem_evals.bench.timing import Times
from stem_evals.cost import REPEATS, Cost, LayerCost, layer_cost, summary
from stem_evals.details import cost as details
from stem_evals.details import relative_costs
from stem_evals.layers import Layers

from .records import TEXT, through_json

SIZES = {"block_size": 16, "sink_blocks": 1, "local_blocks": 1, "tail_blocks": 1, "ratio_short": 0.3, "ratio_long": 0.3}
STEM, FLASH, MASS = Stem(stride=4, **SIZES), FlashPrefillTopK(**SIZES), Mass(block_size=32)
PARTS = ("selection", "attention", "whole")


@pytest.fixture
def measure(model, tokenizer):
    return Cost(model, tokenizer, [TEXT], [320, 192], 2)


def a_call(tokens=320, layer=0):
    """As a model hands it over: views of ``(batch, length, heads, dim)``."""
    q, k, v = (torch.randn(1, tokens, heads, 8).transpose(1, 2) for heads in (4, 2, 2))
    return AttentionCall(layer, q, k, v, None, 0.0)


@pytest.mark.parametrize("policy", [None, STEM, MASS, FLASH, SinkWindow(1, 3, 16)])
def test_a_record_has_every_layer_and_sums_that_equal_their_parts(measure, policy):
    record = measure.run(measure.cases()[0], policy)
    assert through_json(record) == record
    for part in PARTS:
        assert len(record[part]) == 2
        assert record[f"{part}_ms"] == pytest.approx(sum(record[part]), abs=1e-3)
    assert record["seconds"] == pytest.approx(record["whole_ms"] / 1e3)
    assert min(record["whole"]) > 0
    assert record["repeats"] == REPEATS
    assert record["device"] == "cpu"
    assert record["fused"] == (policy is None), "a choice on the CPU is never called fused"


@pytest.mark.parametrize("policy", [STEM, MASS, FLASH, SinkWindow(1, 3, 16)])
def test_density_is_that_of_what_the_host_selects(measure, model, policy):
    case, calls = measure.cases()[0], []
    read(model, measure.ids(case), None, on_attention=calls.append)
    first = read(model, measure.ids(case), policy, dense_below=0).calls[0].density  # later layers get other inputs
    assert 0 < first < 1
    assert layer_cost(policy, calls[0]).density == pytest.approx(first)
    assert 0 < measure.run(case, policy)["density"] < 1


def test_dense_has_no_selection_and_is_the_fastest_of_its_peers(measure):
    record = measure.run(measure.cases()[0], None)
    assert (record["density"], record["selection"]) == (1, [0, 0])
    assert record["whole"] == record["attention"]
    assert record["whole_ms"] <= min(record["dense_ms"].values()) + 1e-3


def test_what_is_timed_is_the_choice_the_attention_and_the_whole_call_and_a_time_is_the_median(monkeypatch):
    ran, rounds = {}, {"selection": [1.0, 9.0, 2.0], "attention": [30.0, 4.0, 5.0], "whole": [6.0, 6.0, 60.0]}

    def noting(calls, device, repeats, on_round):
        ran.update({name: call() for name, call in calls.items()})
        return {name: Times(rounds[name]) for name in calls}

    monkeypatch.setattr(cost, "time_in_turn", noting)
    call = a_call()
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    found = layer_cost(STEM, call)
    assert torch.equal(ran["selection"].indices, STEM(q, k, v).indices)
    torch.testing.assert_close(ran["attention"], ran["whole"])
    assert (found.selection, found.attention, found.whole) == (2.0, 5.0, 6.0)


def test_each_layer_is_timed_with_its_own_factors():
    low, high = (0.1,) * 4, (5.0,) * 4
    call = a_call()
    density = [
        layer_cost(replace(MASS, head_factors=factors), replace(call, layer=layer)).density
        for factors in ((low, high), (low, low), (high, high))
        for layer in (0, 1)
    ]
    assert density[0] == density[2] == density[3] > density[1] == density[4] == density[5]


def test_no_dense_attention_is_said_with_the_reasons(monkeypatch):
    def broken():
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(cost, "dense_peers", lambda q, k, v: {"dense SDPA": broken})
    with pytest.raises(
        UnsupportedError, match="no dense attention to compare with: dense SDPA: cannot run: RuntimeError: no k"
    ):
        layer_cost(None, a_call())


@pytest.mark.parametrize("measure", [Cost, Layers])
def test_models_with_windows_are_refused(measure, model, tokenizer):
    model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(UnsupportedError, match=f"{measure.name} takes models of full causal attention"):
        measure(model, tokenizer, [TEXT], [192], 1)


def record(contender, case, whole, *, fused=True, device="card", tokens=1024):
    density, selection = (1.0, 0.0) if contender == "dense" else (0.2, whole / 4e3)
    layer = LayerCost(
        density, selection, whole / 1e3 - selection, whole / 1e3, fused, {"fast": whole / 1e3} if density == 1 else {}
    )
    about = {"measure": "cost", "case": case, "tokens": tokens, "contender": contender, "device": device}
    return {**about, **summary([layer])}


def test_time_over_dense_is_paired_by_window_and_device():
    records = [
        record("dense", "a", 10), record("dense", "b", 20), record("stem", "a", 2), record("stem", "b", 8),
        record("eager", "a", 30, fused=False), record("elsewhere", "a", 1, device="another"), record("alone", "c", 1),
    ]  # fmt: skip
    costs = relative_costs(records)
    assert set(costs) == {(1024, "dense"), (1024, "stem"), (1024, "eager")}
    assert costs[1024, "dense"].ratio.mean == 1
    assert costs[1024, "stem"].ratio.mean == pytest.approx((0.2 + 0.4) / 2)
    assert costs[1024, "stem"].fused
    assert costs[1024, "eager"].ratio.mean == pytest.approx(3)
    assert costs[1024, "eager"].text == "3.000, eager torch"


def test_the_table_says_who_chose():
    (part,) = details([record("dense", "a", 10), record("stem", "a", 2), record("eager", "a", 30, fused=False)])
    assert part.content.to_numpy()[:, 1:].tolist() == [
        ["dense", "1.000", "0.00", "10.00", "10.00", "1.000", "nothing to select: fast", "1"],
        ["stem", "0.200", "0.50", "1.50", "2.00", "0.200", "kernels", "1"],
        ["eager", "0.200", "7.50", "22.50", "30.00", "3.000", "eager torch", "1"],
    ]
    assert details([record("stem", "a", 2)])[0].content["over dense"].tolist() == [""], "of one sparse record too"
