"""The measure "layers" on a tiny random model, and its report."""

import json

import pytest
import torch

from stem_attention import StemConfig
from stem_attention.errors import UnsupportedError
from stem_attention.evaluation.layers import LayerProbe, Layers, mass_recall, relative_error
from stem_attention.evaluation.layers_plots import heat_maps, section
from stem_attention.evaluation.prefill import AttentionCall, read
from stem_attention.evaluation.texts import Text
from stem_attention.integrations import transformers as stem_host
from stem_attention.policies import Dense, Oracle, SinkWindow, Stem
from stem_attention.policies.oracle import block_mass

CONFIG = StemConfig(
    block_size=16, stride=4, sink_blocks=1, local_blocks=1, tail_blocks=1, ratio_short=0.3, ratio_long=0.3, dense_below=0
)
TEXT = Text("words", " ".join(f"{word} {word * word % 97}" for word in range(400)))


@pytest.fixture(scope="module", autouse=True)
def _registered():
    stem_host.register()


@pytest.fixture
def layers(model, tokenizer):
    return Layers(model, tokenizer, [TEXT], [320, 192], 2)


def ignore(call):
    pass


def test_cases_are_windows_of_each_text_and_length(layers):
    assert [case.tokens for case in layers.cases()] == [320, 320, 192, 192]
    assert len({case.key for case in layers.cases()}) == 4


def test_dense_has_full_recall_and_no_error(layers):
    record = layers.run(layers.cases()[0], None, ignore)
    assert record["density"] == 1
    assert torch.allclose(torch.tensor([record["recall"], record["recall_last"]]), torch.ones(2, 2, 4))
    assert torch.tensor(record["output_error"]).max() < 1e-4
    assert record["hidden_error"] == record["logit_error"] == [0] * 4
    assert record["logit_error_last"] == 0


@pytest.mark.parametrize("what", [CONFIG, Stem(CONFIG), SinkWindow(1, 3, 16)])
def test_a_sparse_contender_loses_mass_and_output(layers, what):
    seen = []
    record = layers.run(layers.cases()[0], what, seen.append)
    assert len(seen) == 4  # two layers, dense and sparse
    assert json.loads(json.dumps(record)) == record
    recall = torch.tensor(record["recall"])
    assert recall.shape == (2, 4)
    assert bool(((recall > 0) & (recall < 1)).all())
    assert bool((torch.tensor(record["output_error"]) > 0).all())
    assert record["hidden_error"][0] < record["hidden_error"][3]
    assert all(error > 0 for error in [*record["hidden_error"][1:], *record["logit_error"][1:]])


def test_a_config_and_its_policy_are_measured_alike(layers):
    records = [layers.run(layers.cases()[0], what, ignore) for what in (CONFIG, Stem(CONFIG))]
    for record in records:
        del record["seconds"]
    assert records[0] == records[1]


def test_each_layer_is_measured_with_its_own_factors(layers):
    def recall(*factors):
        config = StemConfig.mass(block_size=16, key_pool=16, dense_below=0, tail_blocks=0, head_factors=factors)
        return layers.run(layers.cases()[0], config, ignore)["recall"]

    low, high = (0.2, 1.0, 2.0, 0.5), (40.0,) * 4
    both, first, second = recall(low, high), recall(low), recall(high)
    assert both == [first[0], second[1]]
    assert both[0] != second[0]
    assert both[1] != first[1]


def test_the_oracle_has_the_highest_recall_of_its_budget(layers):
    best, stem = (torch.tensor(layers.run(layers.cases()[0], what, ignore)["recall"]) for what in (Oracle(CONFIG), CONFIG))
    assert bool((best > stem).all())


def test_a_dense_tail_has_full_recall_in_the_last_block(layers):
    record = layers.run(layers.cases()[0], CONFIG, ignore)
    assert torch.allclose(torch.tensor(record["recall_last"]), torch.ones(2, 4))


def test_layers_that_a_config_leaves_dense_lose_nothing(layers):
    config = StemConfig(**{**CONFIG.to_dict(), "dense_layers": 1})
    record = layers.run(layers.cases()[0], config, ignore)
    assert record["recall"][0] == pytest.approx([1] * 4)
    assert max(record["recall"][1]) < 1
    assert max(record["output_error"][0]) < 1e-4


def test_sparse_prefill_is_what_the_host_runs(layers, model):
    record = layers.run(layers.cases()[0], CONFIG, ignore)
    ids = layers._texts["words"].window(0, 320)
    dense, sparse = (read(model, ids, what, positions=64).logits for what in (None, CONFIG))
    assert record["logit_error_last"] == pytest.approx(float((sparse - dense).norm() / dense.norm()), rel=1e-4)


@pytest.mark.parametrize(("q_len", "kv_len"), [(160, 160), (37, 150)])
def test_mass_recall_sums_the_oracles_masses_over_kept_blocks(q_len, kv_len):
    q, (k, v) = torch.randn(1, q_len, 4, 8), torch.randn(2, 1, kv_len, 2, 8)
    selection = Stem(CONFIG)(q, k, v)
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


def test_relative_error_is_of_the_expected_norm():
    assert float(relative_error(torch.zeros(2), torch.zeros(2))) == 0
    assert float(relative_error(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0]))) == pytest.approx(0.8)


def test_models_with_windows_are_refused(model, tokenizer):
    model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(UnsupportedError, match="layers compares full causal attention"):
        Layers(model, tokenizer, [TEXT], [192], 1)


@pytest.fixture
def records(layers):
    contenders = {"dense": None, "stem": CONFIG, "window": SinkWindow(1, 3, 16)}
    return [
        {"measure": "layers", "case": case.key, "tokens": case.tokens, "contender": name, **layers.run(case, what, ignore)}
        for case in layers.cases()
        for name, what in contenders.items()
    ]


def test_the_section_has_a_table_and_pictures_for_each_length(records):
    result = section(records)
    assert [table.title for table in result.tables] == ["Layers, 192 tokens", "Layers, 320 tokens"]
    for table in result.tables:
        assert [row[0] for row in table.rows] == ["dense", "stem", "window"]
        assert all(len(row) == len(table.columns) for row in table.rows)
        assert table.columns[-1] == "minus stem"
        assert table.rows[1][-1] == "-"
        assert table.rows[2][-1][0] in "+-"
    assert [stem for stem, _ in result.figures] == ["recall-192-1", "recall-320-1"]
    assert [axes.get_title() for axes in result.figures[0][1].axes[:2]] == ["stem", "window"]


def test_a_partial_run_makes_a_section_too(records):
    assert section(records[:1]).figures == ()
    assert len(section(records[:2]).tables) == 1


def test_many_contenders_are_spread_over_pictures(records):
    template = next(record for record in records if record["contender"] == "stem")
    many = [{**template, "contender": f"policy {number}"} for number in range(13)]
    assert [stem for stem, _ in section(many).figures] == ["recall-320-1", "recall-320-2"]


def test_a_heat_map_shows_layers_down_and_heads_across():
    panel = heat_maps({"only": [[0.5, 0.6, 0.7], [0.8, 0.9, 1.0]]}, "title").axes[0]
    assert panel.images[0].get_array().shape == (2, 3)
