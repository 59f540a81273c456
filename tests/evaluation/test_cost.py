"""The measure "cost" on a tiny random model: what is timed, what a record says, and what the report makes of it."""

import json
from dataclasses import replace

import pytest
import torch

from stem_attention import StemConfig, UnsupportedError
from stem_attention.evaluation import cost
from stem_attention.evaluation.bench_timing import Times, round_count
from stem_attention.evaluation.cost import REPEATS, Cost, LayerCost, config_of, layer_cost, summary
from stem_attention.evaluation.cost_report import relative_costs, section
from stem_attention.evaluation.prefill import AttentionCall, read
from stem_attention.evaluation.texts import Text
from stem_attention.integrations import transformers as stem_host
from stem_attention.policies import Dense, FlashPrefillTopK, Mass, Oracle, SinkWindow, Stem, UniformTopK

CONFIG = StemConfig(
    block_size=16, stride=4, sink_blocks=1, local_blocks=1, tail_blocks=1, ratio_short=0.3, ratio_long=0.3, dense_below=0
)
MASS = StemConfig.mass(block_size=32, dense_below=0)
TEXT = Text("words", " ".join(f"{word} {word * word % 97}" for word in range(400)))
PARTS = ("selection", "attention", "whole")


@pytest.fixture(scope="module", autouse=True)
def _registered():
    stem_host.register()


@pytest.fixture
def measure(model, tokenizer):
    return Cost(model, tokenizer, [TEXT], [320, 192], 2)


def ignore(call):
    pass


def a_call(tokens=320, layer=0):
    """As a model hands it over: views of ``(batch, length, heads, dim)``."""
    q, k, v = (torch.randn(1, tokens, heads, 8).transpose(1, 2) for heads in (4, 2, 2))
    return AttentionCall(layer, q, k, v, None, 0.0)


@pytest.mark.parametrize("what", [None, CONFIG, MASS, UniformTopK(CONFIG), FlashPrefillTopK(CONFIG), SinkWindow(1, 3, 16)])
def test_a_record_has_every_layer_and_sums_that_equal_their_parts(measure, what):
    seen = []
    record = measure.run(measure.cases()[0], what, seen.append)
    assert [call.layer for call in seen] == [0, 1]
    assert json.loads(json.dumps(record)) == record
    for part in PARTS:
        assert len(record[part]) == 2
        assert record[f"{part}_ms"] == pytest.approx(sum(record[part]), abs=1e-3)
    assert record["seconds"] == pytest.approx(record["whole_ms"] / 1e3)
    assert min(record["whole"]) > 0
    assert record["repeats"] == REPEATS
    assert record["device"] == "cpu"


@pytest.mark.parametrize("what", [CONFIG, MASS, UniformTopK(CONFIG), FlashPrefillTopK(CONFIG), SinkWindow(1, 3, 16)])
def test_density_is_that_of_what_the_host_selects(measure, model, what):
    case = measure.cases()[0]
    ids = measure._texts["words"].window(case.about["start"], case.tokens)
    record, reading = measure.run(case, what, ignore), read(model, ids, what)
    first = reading.calls[0].density  # later layers of a sparse prefill get other inputs
    assert 0 < first < 1
    call = first_call(model, ids)
    assert layer_cost(what, call).density == pytest.approx(first)
    assert 0 < record["density"] < 1


def first_call(model, ids):
    calls = []
    read(model, ids, None, on_attention=calls.append)
    return calls[0]


def test_dense_has_no_selection_and_is_the_fastest_of_its_peers(measure):
    record = measure.run(measure.cases()[0], None, ignore)
    assert (record["density"], record["selection"], record["fused"]) == (1, [0, 0], True)
    assert record["whole"] == record["attention"]
    assert record["whole_ms"] <= min(record["dense_ms"].values()) + 1e-3


def test_what_is_timed_is_the_choice_the_attention_and_the_whole_call(monkeypatch):
    ran = {}

    def noting(calls, device, repeats, on_round):
        ran.update({name: call() for name, call in calls.items()})
        return {name: Times([float(i + 1)] * repeats) for i, name in enumerate(calls)}

    monkeypatch.setattr(cost, "time_in_turn", noting)
    call = a_call()
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    found = layer_cost(CONFIG, call)
    assert torch.equal(ran["selection"].indices, Stem(CONFIG)(q, k, v).indices)
    torch.testing.assert_close(ran["attention"], ran["whole"])
    assert (found.selection, found.attention, found.whole) == (1.0, 2.0, 3.0)
    ran.clear()
    found = layer_cost(SinkWindow(1, 3, 16), call)
    assert torch.equal(ran["selection"].indices, SinkWindow(1, 3, 16)(q, k, v).indices)
    assert (found.selection, found.attention, found.whole) == (1.0, 2.0, 3.0)
    assert set(ran) == {"selection", "attention"}
    assert not found.fused


def test_a_time_is_the_median_of_its_rounds(monkeypatch):
    rounds = {"selection": [1.0, 9.0, 2.0], "attention": [30.0, 4.0, 5.0]}
    monkeypatch.setattr(cost, "time_in_turn", lambda calls, *_: {name: Times(rounds[name]) for name in calls})
    found = layer_cost(SinkWindow(1, 3, 16), a_call())
    assert (found.selection, found.attention, found.whole) == (2.0, 5.0, 7.0)


def test_every_call_is_warmed_up_and_repeated():
    class Counting(SinkWindow):
        calls = 0

        def __call__(self, q, k, v, *, scale=None, prompt_len=None):
            type(self).calls += 1
            return super().__call__(q, k, v, scale=scale, prompt_len=prompt_len)

    found = layer_cost(Counting(1, 3, 16), a_call())
    assert Counting.calls == 1 + round_count(torch.device("cpu"), REPEATS)  # once for the attention to have a selection
    assert found.whole == found.selection + found.attention


def test_q_k_and_v_are_views_of_the_hosts_tensors():
    call, given = a_call(), []

    class Looking(SinkWindow):
        def __call__(self, q, k, v, *, scale=None, prompt_len=None):
            given.append([x.data_ptr() for x in (q, k, v)])
            return super().__call__(q, k, v, scale=scale, prompt_len=prompt_len)

    layer_cost(Looking(1, 3, 16), call)
    assert all(pointers == [x.data_ptr() for x in (call.q, call.k, call.v)] for pointers in given)


def test_layers_and_lengths_that_a_config_leaves_dense_are_timed_dense():
    config = StemConfig(**{**CONFIG.to_dict(), "dense_layers": 1})
    assert layer_cost(config, a_call(layer=0)).density == 1
    assert layer_cost(config, a_call(layer=1)).density < 1
    assert layer_cost(StemConfig(**{**CONFIG.to_dict(), "dense_below": 321}), a_call()).density == 1
    assert layer_cost(StemConfig(**{**CONFIG.to_dict(), "dense_below": 320}), a_call()).density < 1


def test_each_layer_is_timed_with_its_own_factors():
    low, high = (0.1,) * 4, (5.0,) * 4
    call = a_call()
    density = [
        layer_cost(replace(MASS, head_factors=factors), replace(call, layer=layer)).density
        for factors in ((low, high), (low,), (high,))
        for layer in (0, 1)
    ]
    assert density[0] == density[2] == density[3] > density[1] == density[4] == density[5]


def test_policies_that_a_config_says_too_are_timed_as_the_config():
    assert config_of(Stem(CONFIG)) == CONFIG
    assert config_of(Mass(MASS)) == MASS
    assert config_of(UniformTopK(CONFIG)) == UniformTopK(CONFIG).as_stem().config
    assert config_of(Oracle(CONFIG)) is config_of(Dense(16)) is config_of(FlashPrefillTopK(CONFIG)) is None


def test_a_choice_on_the_cpu_is_never_called_fused(measure):
    assert not measure.run(measure.cases()[0], CONFIG, ignore)["fused"]


def test_no_dense_attention_is_said_with_the_reasons(monkeypatch):
    def broken():
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(cost, "dense_peers", lambda q, k, v: {"dense SDPA": broken})
    with pytest.raises(
        UnsupportedError, match="no dense attention to compare with: dense SDPA: cannot run: RuntimeError: no k"
    ):
        layer_cost(None, a_call())


def test_models_with_windows_are_refused(model, tokenizer):
    model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(UnsupportedError, match="cost compares full causal attention"):
        Cost(model, tokenizer, [TEXT], [192], 1)


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


def test_the_section_says_who_chose():
    rows = section([record("dense", "a", 10), record("stem", "a", 2), record("eager", "a", 30, fused=False)]).tables[0].rows
    assert [row[1:] for row in rows] == [
        ("dense", "1.000", "0.00", "10.00", "10.00", "1.000", "nothing to select: fast", "1"),
        ("stem", "0.200", "0.50", "1.50", "2.00", "0.200", "kernels", "1"),
        ("eager", "0.200", "7.50", "22.50", "30.00", "3.000", "eager torch", "1"),
    ]


def test_a_section_can_be_made_of_one_sparse_record():
    assert section([record("stem", "a", 2)]).tables[0].rows[0][6] == ""
