"""The parts of the servers' plug-ins that need no server: settings, rows and counters."""

import json
import logging
import re
from types import SimpleNamespace

import pytest
import torch

from stem_attention import Mass, Stem, UnsupportedError, select_blocks
from stem_attention.backends import run
from stem_attention.call import Call
from stem_attention.integrations.serving import report
from stem_attention.integrations.serving.counters import Counters
from stem_attention.integrations.serving.rows import Row, SparseRows
from stem_attention.integrations.serving.settings import ENVIRONMENT, Settings, read_settings
from stem_attention.policies import SinkWindow


@pytest.fixture(autouse=True)
def silent_environment(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)


def test_nothing_said_means_keep_by_mass():
    for additional in (None, {}, {"other": 1}, "opaque"):
        assert read_settings(additional) == Settings(Mass())


def test_settings_come_from_one_of_two_places(monkeypatch):
    given = {"policy": "paper:min_blocks=9", "dense_below": 100, "dense_layers": 2, "min_query_len": 64, "backend": "torch"}
    results = [read_settings({"stem_attention": given})]
    monkeypatch.setenv(ENVIRONMENT, f" {json.dumps(given)} ")
    results.append(read_settings({}))
    for settings, source in zip(results, ("--additional-config stem_attention", ENVIRONMENT), strict=True):
        assert settings == Settings(Stem.paper(min_blocks=9), 100, 2, 64, "torch", source)


@pytest.mark.parametrize("given", ["mass:share=8", {"policy": "mass:share=8"}, {"policy": {"policy": "mass", "share": 8}}])
def test_a_policy_is_a_spec_or_an_object_with_its_name(given, monkeypatch):
    assert read_settings({"stem_attention": given}).policy == Mass(share=8)
    monkeypatch.setenv(ENVIRONMENT, given if isinstance(given, str) else json.dumps(given))
    assert read_settings() == Settings(Mass(share=8), source=ENVIRONMENT)


def test_a_calibrated_policy_is_read_from_its_file(monkeypatch, tmp_path):
    calibrated = Mass(share=3.5, head_factors=((0.5, 2.0), (1.0, 4.25), (0.125, 1.0)))
    path = tmp_path / "heads.json"
    path.write_text(calibrated.to_json() + "\n")
    monkeypatch.setenv(ENVIRONMENT, str(path))
    assert read_settings().policy == calibrated
    monkeypatch.setenv(ENVIRONMENT, json.dumps({"policy": str(path), "min_query_len": 64}))
    assert read_settings() == Settings(calibrated, min_query_len=64, source=ENVIRONMENT)


def test_a_log_counts_the_head_factors_and_shows_everything_else():
    factors = ((0.123456, 2.0, 1.0), (1.0, 4.25, 1.0))
    plain, calibrated = (str(Settings(Mass(share=3.5, head_factors=some))) for some in (None, factors))
    assert calibrated == f"{plain} with head_factors of 2 x 3"
    fields = Mass(share=3.5).to_dict()
    del fields["head_factors"]
    assert plain == f"settings from the defaults: {json.dumps(fields)}"
    assert str(Settings(Stem.paper())) == f"settings from the defaults: {json.dumps(Stem.paper().to_dict())}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected a JSON object, got invalid JSON"),
        ("masss", "policy: expected one of "),
        ("stem@0.2", "policy: expected a spec without @DENSITY"),
        ('{"policy": {"policy": "stem", "decay": 2}}', "decay: expected "),
        ('{"policy": ["paper"]}', "policy: expected "),
        ('{"share": 8}', "settings: expected names among policy, dense_below, dense_layers, min_query_len, backend, got share"),
        ('{"source": "me"}', "settings: expected names among "),
        ('{"min_query_len": 1}', "min_query_len: expected an integer >= 2, got 1"),
        ('{"min_query_len": true}', "min_query_len: expected an integer >= 2, got True"),
        ('{"min_query_len": null}', "min_query_len: expected an integer >= 2, got None"),
        ('{"dense_below": -1}', "dense_below: expected an integer >= 0 or None, got -1"),
        ('{"dense_layers": 1.5}', "dense_layers: expected an integer >= 0, got 1.5"),
        ('{"backend": 3}', "backend: expected the name of a backend, got 3"),
    ],
)
def test_bad_settings_name_their_place_and_field(text, message, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, text)
    with pytest.raises(ValueError, match=f"^{ENVIRONMENT}: {re.escape(message)}"):
        read_settings()


def test_a_place_that_holds_no_settings_and_two_places_that_speak(monkeypatch):
    with pytest.raises(ValueError, match="^--additional-config stem_attention: expected a JSON object or .* got 1"):
        read_settings({"stem_attention": 1})
    monkeypatch.setenv(ENVIRONMENT, "paper")
    with pytest.raises(ValueError, match="keep one of the two"):
        read_settings({"stem_attention": {}})


@pytest.mark.parametrize("name", ["stem-attention", "stem", "StemAttention"])
def test_a_slip_in_our_name_is_refused(name):
    with pytest.raises(ValueError, match=f"^--additional-config: expected .* under 'stem_attention', got '{name}'; rename it"):
        read_settings({name: "paper", "other": 1})


def test_what_serves_a_model_is_explained_or_refused():
    assert Settings(dense_below=77).explain("cpu", torch.float32, 64).dense_below == 77
    assert Settings().explain("cpu", torch.bfloat16, 64).chosen == "torch"
    with pytest.raises(UnsupportedError, match="^Stem cannot run this model.\n(.|\n)*triton: cannot run: "):
        Settings(backend="triton").explain("cpu", torch.float32, 64)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (Row(32, 4900, 5000), None),
        (Row(31, 4900, 5000), "short chunk"),
        (Row(4095, 4095, 4095), "short prompt"),
        (Row(4096, 4096, 4096), None),
        (Row(4096, 4096, 100), None),
        (Row(100, 4095, 0), "short prompt"),
        (Row(100, 100, 5000, "image tokens"), "image tokens"),
    ],
)
def test_which_rows_take_stem(row, reason):
    assert row.dense_reason(min_query_len=32, dense_below=4096) == reason


@pytest.mark.parametrize("chosen", [[0], [1, 2], [2], [0, 1, 2], [0, 2], [0, 3], [1, 3]])
def test_tokens_and_pages_are_those_of_the_chosen_rows(chosen):
    rows = [Row(3, 9, 20), Row(1, 5, 5), Row(4, 4, 8), Row(2, 12, 0)]
    owner = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 3, 3])
    pages = torch.arange(8, dtype=torch.int32).view(4, 2)
    sparse = SparseRows.of(rows, chosen, pages, Mass())
    assert owner[sparse.tokens].tolist() == [i for i in chosen for _ in range(rows[i].q_len)]
    assert torch.equal(sparse.batch.page_table, pages[chosen])
    assert sparse.batch.cu_q.diff().tolist() == [rows[i].q_len for i in chosen]
    assert sparse.batch.cu_k.diff().tolist() == [rows[i].kv_len for i in chosen]
    assert sparse.batch.prompt_lens == tuple((20, 5, 8, 12)[i] for i in chosen)
    neighbours = chosen == list(range(chosen[0], chosen[-1] + 1))
    assert isinstance(sparse.tokens, slice) == neighbours


@pytest.mark.parametrize(
    ("policy", "is_known"),
    [
        (Stem(block_size=16, stride=4), True),
        (SinkWindow(block_size=16), True),
        (Stem(block_size=16, stride=4, forced="extra"), False),
        (Mass(block_size=16, query_pool=4, key_pool=4), False),
    ],
)
def test_counters_tell_what_the_selection_keeps(policy, is_known):
    count, kept, causal = Counters(), 0, 0
    for q_len, kv_len, prompt_len in ((500, 500, 500), (77, 350, 500), (64, 64, 300), (33, 1000, 1000)):
        rows, pages = [Row(q_len, kv_len, prompt_len)], torch.arange(-(-kv_len // 16), dtype=torch.int32)[None]
        q, cache = torch.randn(q_len, 2, 8), torch.randn(pages.numel(), 16, 1, 8)
        k = cache.flatten(0, 1)[None, :kv_len]
        selection = select_blocks(q[None], k, k, policy=policy, scale=0.3, prompt_len=prompt_len)
        kept += int(selection.counts.sum())
        causal += round(int(selection.counts.sum()) / selection.density())
        sparse = SparseRows.of(rows, [0], pages, policy)
        count.count_sparse(rows)
        told = count.count_layer(sparse, heads=2)
        assert (told is None) == is_known
        run(Call(q, cache, cache, policy, 0.3, batch=sparse.batch, dense_below=0, kept=told))
    assert (count.sparse_rows, count.sparse_tokens, count.causal_blocks) == (4, 674, causal)
    assert count.kept_blocks == kept
    assert f"{kept / causal:.3f}" in str(count)


def test_counters_are_plain_json_and_start_again():
    count, policy = Counters(), Stem(block_size=16, stride=4, local_blocks=1, tail_blocks=0)
    assert count.density == 1
    rows = [Row(64, 64, 64)]
    count.count_sparse(rows)
    assert count.count_layer(SparseRows.of(rows, [0], torch.zeros(1, 4, dtype=torch.int32), policy), heads=3) is None
    count.dense_rows.update(["decode", "decode", "short prompt"])
    assert json.loads(json.dumps(count.to_dict())) == {
        "sparse_rows": 1, "sparse_tokens": 64, "kept_blocks": 21, "causal_blocks": 30, "density": 0.7,
        "dense_rows": {"decode": 2, "short prompt": 1},
    }  # fmt: skip
    count.reset()
    assert count == Counters()


@pytest.fixture
def counted(monkeypatch):
    """Counters and metrics that have told nothing yet."""
    monkeypatch.setattr(report, "COUNTERS", Counters())
    monkeypatch.setattr(report, "_last", [-60.0])
    monkeypatch.setattr(report, "_told", {"causal_blocks": 0, "kept_blocks": 0})
    return report.COUNTERS


def test_counters_are_reported_once_a_minute_and_not_before_blocks_were_read(counted, monkeypatch, caplog):
    now = [1000.0]
    monkeypatch.delenv(report.SHARED_METRICS, raising=False)
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    with caplog.at_level("INFO"):
        for blocks, seconds, lines in ((0, 0, 0), (8, 0, 1), (8, 59, 1), (8, 60, 2), (8, 61, 2)):
            counted.causal_blocks, now[0] = blocks, 1000.0 + seconds
            report.report_now_and_then(logging.getLogger())
            assert len(caplog.messages) == lines


def test_metrics_grow_by_what_is_new_also_after_a_reset(counted, monkeypatch, tmp_path):
    monkeypatch.setenv(report.SHARED_METRICS, str(tmp_path))
    grown = {"causal_blocks": [], "kept_blocks": []}
    metrics = {name: SimpleNamespace(inc=seen.append) for name, seen in grown.items()}
    monkeypatch.setattr(report, "_metrics", lambda: metrics)
    for causal, kept in ((10, 4), (10, 4), (25, 6), (3, 1)):  # the last after a reset
        counted.reset()
        counted.causal_blocks, counted._known = causal, kept
        report.report(logging.getLogger())
    assert grown == {"causal_blocks": [10, 0, 15, 3], "kept_blocks": [4, 0, 2, 1]}


def test_a_server_goes_on_where_there_is_no_folder_for_metrics(counted, monkeypatch, tmp_path, caplog):
    def metrics():
        raise FileNotFoundError(2, "No such file or directory", str(tmp_path / "gone" / "counter_1.db"))

    monkeypatch.setenv(report.SHARED_METRICS, str(tmp_path / "gone"))
    monkeypatch.setattr(report, "_metrics", metrics)  # as prometheus_client does, which is not installed everywhere
    counted.causal_blocks = 8
    report.report(logging.getLogger())
    assert "gone" in caplog.text
    assert f"make the folder that {report.SHARED_METRICS} names" in caplog.text


@pytest.mark.parametrize("folder", [None, ""])
def test_without_a_folder_for_metrics_there_are_none(folder, counted, monkeypatch):
    monkeypatch.delenv(report.SHARED_METRICS, raising=False)
    if folder is not None:
        monkeypatch.setenv(report.SHARED_METRICS, folder)
    monkeypatch.setattr(report, "_metrics", lambda: pytest.fail("made"))
    report.report(logging.getLogger())
