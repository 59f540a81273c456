"""The measure "layers" on a tiny random model, and its report."""

import pytest
import torch

from stem_attention.models.prefill import AttentionCall, read
from stem_attention.policies import Dense, Mass, SinkWindow, Stem
from stem_attention.policies.oracle import block_mass
from stem_evals.details import layers as details
from stem_evals.layers import LayerProbe, Layers, mass_recall

from .records import TEXT, through_json

SIZES = {"sink_blocks": 1, "local_blocks": 1, "tail_blocks": 1, "ratio_short": 0.3, "ratio_long": 0.3}
STEM = Stem(block_size=16, stride=4, **SIZES)


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
    q, k, v = torch.randn(1, 4, 40, 8), torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8)
    probe = LayerProbe(SinkWindow(0, 1, 16))
    probe(AttentionCall(0, q, k, v, None, 0.0))
    selection = SinkWindow(0, 1, 16)(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    rows = mass_recall(q.transpose(1, 2), k.transpose(1, 2), 8**-0.5, selection)
    expected = (16 * rows[:, 0] + 16 * rows[:, 1] + 8 * rows[:, 2]) / 40
    assert probe.recall[0] == pytest.approx(expected.tolist(), abs=1e-5)
    assert probe.recall_last[0] == pytest.approx(rows[:, 2].tolist(), abs=1e-5)


@pytest.fixture
def records(layers):
    contenders = {"dense": None, "stem": STEM, "window": SinkWindow(1, 3, 16)}
    return [
        {"measure": "layers", "case": case.key, "tokens": case.tokens, "contender": name, **layers.run(case, what)}
        for case in layers.cases()
        for name, what in contenders.items()
    ]


def test_there_is_a_table_and_a_picture_for_each_length(records):
    parts = details(records)
    assert [part.title for part in parts] == ["Layers, 192 tokens", "Layers, 320 tokens", "recall-192", "recall-320"]
    for part in parts[:2]:
        assert part.content["contender"].tolist() == ["dense", "stem", "window"]
        assert float(part.content["recall"][0]) == 1
        assert float(part.content["recall"][1]) < 1
    panels = parts[2].content.axes[:2]
    assert [axes.get_title() for axes in panels] == ["stem", "window"]
    assert panels[0].images[0].get_array().shape == (2, 4)
    assert [part.title for part in details(records[:1])] == ["Layers, 320 tokens"], "a partial run makes a table too"
