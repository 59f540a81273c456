"""The measures that look into layers, "layers" and "cost", on a tiny random model, and what the report makes of them."""

from dataclasses import replace

import pytest
import torch

from stem_attention import UnsupportedError
from stem_attention.models.prefill import AttentionCall, read
from stem_attention.policies import Dense, FlashPrefillTopK, Mass, SinkWindow, Stem
from stem_attention.policies.oracle import block_mass
from stem_evals import cost, details
from stem_evals.bench.timing import Times
from stem_evals.cost import REPEATS, Cost, LayerCost, layer_cost, summary
from stem_evals.layers import LayerProbe, Layers, mass_recall

from .records import TEXT, through_json

SIZES = {"sink_blocks": 1, "local_blocks": 1, "tail_blocks": 1, "ratio_short": 0.3, "ratio_long": 0.3}
STEM, FLASH, MASS = Stem(block_size=16, stride=4, **SIZES), FlashPrefillTopK(block_size=16, **SIZES), Mass(block_size=32)
PARTS = ("selection", "attention", "whole")


@pytest.fixture
def layers(model, tokenizer):
    return Layers(model, tokenizer, [TEXT], [320, 192], 2)


def test_dense_has_full_recall_and_no_error(layers):
    record = layers.run(layers.cases()[0], None)
    assert record["density"] == 1
    assert torch.allclose(torch.tensor([record["recall"], record["recall_last"]]), torch.ones(2, 2, 4))
    assert torch.tensor(record["output_error"]).max() < 1e-4
    assert record["hidden_error"] == record["logit_error"] == [0] * 4
    assert record["logit_error_last"] == 0


@pytest.mark.parametrize("policy", [STEM, SinkWindow(1, 3, 16)])
def test_a_sparse_contender_loses_mass_and_output(layers, policy):
    record = layers.run(layers.cases()[0], policy)
    assert through_json(record) == record
    recall = torch.tensor(record["recall"])
    assert recall.shape == (2, 4)
    assert bool(((recall > 0) & (recall < 1)).all())
    assert bool((torch.tensor(record["output_error"]) > 0).all())
    assert record["hidden_error"][0] < record["hidden_error"][3]
    assert all(error > 0 for error in [*record["hidden_error"][1:], *record["logit_error"][1:]])
    if policy is STEM:  # a dense tail has full recall in the last block
        assert torch.allclose(torch.tensor(record["recall_last"]), torch.ones(2, 4))


def test_each_layer_is_measured_with_its_own_factors(layers):
    def recall(*factors):
        policy = Mass(block_size=16, key_pool=16, tail_blocks=0, head_factors=factors)
        probe = LayerProbe(policy)
        read(layers._model, layers.ids(layers.cases()[0]), None, on_attention=probe)
        return probe.recall

    low, high = (0.2, 1.0, 2.0, 0.5), (40.0,) * 4
    both, first, second = recall(low, high), recall(low, low), recall(high, high)
    assert both == [first[0], second[1]]
    assert both[0] != second[0]
    assert both[1] != first[1]


def test_sparse_prefill_is_what_the_host_runs(layers, model):
    record = layers.run(layers.cases()[0], STEM)
    ids = layers._texts["words"].window(0, 320)
    dense, sparse = (read(model, ids, what, dense_below=0, positions=64).logits for what in (None, STEM))
    assert record["logit_error_last"] == pytest.approx(float((sparse - dense).norm() / dense.norm()), rel=1e-4)


@pytest.mark.parametrize(("q_len", "kv_len"), [(160, 160), (37, 150)])
def test_mass_recall_sums_the_oracles_masses_over_kept_blocks(q_len, kv_len):
    q, (k, v) = torch.randn(1, q_len, 4, 8), torch.randn(2, 1, kv_len, 2, 8)
    selection = STEM(q, k, v)
    recall, mask = mass_recall(q, k, 0.3, selection), selection.to_mask()
    assert recall.shape == (4, selection.rows)
    for i in range(selection.rows):
        mass = block_mass(q, k, 0.3, 16, selection.first_row + i)[0]
        for head in range(4):
            kept = mask[0, head, i].nonzero().flatten()
            assert float(recall[head, i]) == pytest.approx(float(mass[head, kept].sum()), abs=1e-5)
    assert torch.allclose(mass_recall(q, k, 0.3, Dense(16)(q, k, v)), torch.ones(4, selection.rows))


def test_the_probe_weighs_rows_by_their_queries():
    call, probe = a_call(40), LayerProbe(SinkWindow(0, 1, 16))
    probe(call)
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    rows = mass_recall(q, k, 8**-0.5, SinkWindow(0, 1, 16)(q, k, v))
    expected = (16 * rows[:, 0] + 16 * rows[:, 1] + 8 * rows[:, 2]) / 40
    assert probe.recall[0] == pytest.approx(expected.tolist(), abs=1e-5)
    assert probe.recall_last[0] == pytest.approx(rows[:, 2].tolist(), abs=1e-5)


def test_there_is_a_table_and_a_picture_for_each_length(layers):
    contenders = {"dense": None, "stem": STEM, "window": SinkWindow(1, 3, 16)}
    records = [
        {"measure": "layers", "case": case.key, "tokens": case.tokens, "contender": name, **layers.run(case, what)}
        for case in layers.cases()
        for name, what in contenders.items()
    ]
    parts = details.layers(records)
    assert [part.title for part in parts] == ["Layers, 192 tokens", "Layers, 320 tokens", "recall-192", "recall-320"]
    for part in parts[:2]:
        assert part.content["contender"].tolist() == ["dense", "stem", "window"]
        assert float(part.content["recall"][0]) == 1
        assert float(part.content["recall"][1]) < 1
    panels = parts[2].content.axes[:2]
    assert [axes.get_title() for axes in panels] == ["stem", "window"]
    assert panels[0].images[0].get_array().shape == (2, 4)
    assert [part.title for part in details.layers(records[:1])] == ["Layers, 320 tokens"], "a partial run makes a table too"


@pytest.fixture
def costs(model, tokenizer):
    return Cost(model, tokenizer, [TEXT], [320, 192], 2)


def a_call(tokens=320, layer=0):
    """As a model hands it over: views of ``(batch, length, heads, dim)``."""
    q, k, v = (torch.randn(1, tokens, heads, 8).transpose(1, 2) for heads in (4, 2, 2))
    return AttentionCall(layer, q, k, v, None, 0.0)


@pytest.mark.parametrize("policy", [None, STEM, MASS, FLASH, SinkWindow(1, 3, 16)])
def test_a_record_has_every_layer_and_sums_that_equal_their_parts(costs, policy):
    record = costs.run(costs.cases()[0], policy)
    assert through_json(record) == record
    for part in PARTS:
        assert len(record[part]) == 2
        assert record[f"{part}_ms"] == pytest.approx(sum(record[part]), abs=1e-3)
    assert record["seconds"] == pytest.approx(record["whole_ms"] / 1e3)
    assert min(record["whole"]) > 0
    assert (record["repeats"], record["device"]) == (REPEATS, "cpu")
    assert record["fused"] == (policy is None), "a choice on the CPU is never called fused"
    if policy is None:  # nothing to select, and the fastest of its peers
        assert (record["density"], record["selection"], record["whole"]) == (1, [0, 0], record["attention"])
        assert record["whole_ms"] <= min(record["dense_ms"].values()) + 1e-3


@pytest.mark.parametrize("policy", [STEM, MASS, FLASH, SinkWindow(1, 3, 16)])
def test_density_is_that_of_what_the_host_selects(costs, model, policy):
    case, calls = costs.cases()[0], []
    read(model, costs.ids(case), None, on_attention=calls.append)
    first = read(model, costs.ids(case), policy, dense_below=0).calls[0].density  # later layers get other inputs
    assert 0 < first < 1
    assert layer_cost(policy, calls[0]).density == pytest.approx(first)
    assert 0 < costs.run(case, policy)["density"] < 1


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
    with pytest.raises(UnsupportedError, match="dense SDPA: cannot run: RuntimeError: no kernel for this"):
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
    found = details.relative_costs(records)
    assert set(found) == {(1024, "dense"), (1024, "stem"), (1024, "eager")}
    assert found[1024, "dense"].ratio.mean == 1
    assert found[1024, "stem"].ratio.mean == pytest.approx((0.2 + 0.4) / 2)
    assert found[1024, "stem"].fused
    assert found[1024, "eager"].ratio.mean == pytest.approx(3)
    assert found[1024, "eager"].text == "3.000, eager torch"


def test_the_table_says_who_chose():
    (part,) = details.cost([record("dense", "a", 10), record("stem", "a", 2), record("eager", "a", 30, fused=False)])
    assert part.content.to_numpy()[:, 1:].tolist() == [
        ["dense", "1.000", "0.00", "10.00", "10.00", "1.000", "nothing to select: fast", "1"],
        ["stem", "0.200", "0.50", "1.50", "2.00", "0.200", "kernels", "1"],
        ["eager", "0.200", "7.50", "22.50", "30.00", "3.000", "eager torch", "1"],
    ]
    assert details.cost([record("stem", "a", 2)])[0].content["over dense"].tolist() == [""], "of one sparse record too"
