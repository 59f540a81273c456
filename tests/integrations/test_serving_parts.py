"""The parts of the vLLM plug-in that need no vLLM: settings, rows and counters."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from stem_attention import StemConfig, select_blocks
from stem_attention.integrations.serving_counters import Counters
from stem_attention.integrations.serving_rows import Row, SparseRows, token_index
from stem_attention.integrations.serving_settings import ENVIRONMENT, Settings, check_head_factors, read_settings


def test_nothing_said_means_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    for additional in (None, {}, {"other": 1}, "opaque"):
        assert read_settings(additional) == Settings(StemConfig())


def test_settings_come_from_one_of_three_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = {"preset": "paper", "min_blocks": 9, "min_query_len": 64, "backend": "torch"}
    expected = (StemConfig.paper(min_blocks=9), 64, "torch")
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    results = [read_settings({"stem_attention": given})]
    monkeypatch.setenv(ENVIRONMENT, f" {json.dumps(given)} ")
    results.append(read_settings({}))
    path = tmp_path / "stem.json"
    path.write_text(json.dumps(given))
    monkeypatch.setenv(ENVIRONMENT, str(path))
    results.append(read_settings())
    assert [(s.config, s.min_query_len, s.backend) for s in results] == [expected] * 3
    assert [s.source for s in results] == ["--additional-config stem_attention", ENVIRONMENT, ENVIRONMENT]


def test_a_calibrated_config_is_read_from_its_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calibrated = StemConfig.mass(share=3.5, head_factors=((0.5, 2.0), (1.0, 4.25), (0.125, 1.0)))
    path = tmp_path / "calibrated.json"
    path.write_text(calibrated.to_json() + "\n")
    monkeypatch.setenv(ENVIRONMENT, str(path))
    assert read_settings().config == calibrated
    short = {"preset": "mass", "share": 3.5, "head_factors": [[0.5, 2], [1, 4.25], [0.125, 1]], "min_query_len": 64}
    monkeypatch.setenv(ENVIRONMENT, json.dumps(short))
    assert read_settings() == Settings(calibrated, 64, source=ENVIRONMENT)
    monkeypatch.delenv(ENVIRONMENT)
    assert read_settings({"stem_attention": short}).config == calibrated


def test_a_log_counts_the_head_factors_and_shows_everything_else() -> None:
    factors = ((0.123456, 2.0, 1.0), (1.0, 4.25, 1.0))
    plain, calibrated = (str(Settings(StemConfig.mass(share=3.5, head_factors=some))) for some in (None, factors))
    assert calibrated == f"{plain} and head_factors of 2 x 3"
    fields = StemConfig.mass(share=3.5).to_dict()
    del fields["head_factors"]
    assert plain == f"settings from the defaults: {json.dumps(fields)}"


@pytest.mark.parametrize("shape", [(3, 4), (1, 4)])
def test_head_factors_of_this_model_pass(shape: tuple[int, int]) -> None:
    rows, heads = shape
    check_head_factors(StemConfig.mass(head_factors=((1.0,) * heads,) * rows), layers=3, heads=4)
    check_head_factors(StemConfig(), layers=3, heads=4)


@pytest.mark.parametrize("shape", [(2, 4), (4, 4), (3, 2), (3, 8), (1, 1), (4, 3)])
def test_head_factors_of_another_model_are_refused(shape: tuple[int, int]) -> None:
    rows, heads = shape
    message = (
        "head_factors: expected 3 x 4 of them (layers x query heads of this model), or 1 x 4 for every layer, "
        f"got {rows} x {heads}; run stem-attention calibrate on this model"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_head_factors(StemConfig.mass(head_factors=((1.0,) * heads,) * rows), layers=3, heads=4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "STEM_ATTENTION_CONFIG: expected a JSON object, got invalid JSON"),
        ("/no/such.json", "STEM_ATTENTION_CONFIG: expected a JSON object or the path of a file with one, got '/no/such.json'"),
        ('{"decay": 2}', "STEM_ATTENTION_CONFIG: decay: expected a finite number > 0 and <= 1, got 2"),
        ('{"blocksize": 2}', "STEM_ATTENTION_CONFIG: fields: expected names among preset, min_query_len, backend, "),
        ('{"preset": "fast"}', "STEM_ATTENTION_CONFIG: preset: expected one of default, paper, angelslim, mass, got 'fast'"),
        ('{"preset": ["paper"]}', "STEM_ATTENTION_CONFIG: preset: expected one of"),
        ('{"min_query_len": 1}', "STEM_ATTENTION_CONFIG: min_query_len: expected an integer >= 2, got 1"),
        ('{"min_query_len": true}', "STEM_ATTENTION_CONFIG: min_query_len: expected an integer >= 2, got True"),
        ('{"preset": "mass", "head_factors": [1, 2]}', "STEM_ATTENTION_CONFIG: head_factors: expected None, or a row for each"),
        ('{"head_factors": [[1, 2]]}', "STEM_ATTENTION_CONFIG: head_factors: expected its default, None, got ((1.0, 2.0),)"),
        ('{"backend": 3}', "STEM_ATTENTION_CONFIG: backend: expected the name of a backend, got 3"),
    ],
)
def test_bad_settings_name_their_place_and_field(text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, text)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        read_settings()


def test_a_file_that_holds_no_object_and_additional_config_that_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "stem.json"
    path.write_text("[1]")
    monkeypatch.setenv(ENVIRONMENT, str(path))
    with pytest.raises(ValueError, match="^STEM_ATTENTION_CONFIG: expected a JSON object, got \\[1\\]"):
        read_settings()
    with pytest.raises(ValueError, match="keep one of the two"):
        read_settings({"stem_attention": {}})
    monkeypatch.delenv(ENVIRONMENT)
    with pytest.raises(ValueError, match="^--additional-config stem_attention: expected a JSON object, got 'on'"):
        read_settings({"stem_attention": "on"})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (Row(100, 100, 5000), None),
        (Row(100, 4900, 5000), None),
        (Row(32, 4900, 5000), None),
        (Row(31, 4900, 5000), "short chunk"),
        (Row(1, 5000, 5000), "short chunk"),
        (Row(4095, 4095, 4095), "short prompt"),
        (Row(4096, 4096, 4096), None),
        (Row(4096, 4096, 100), None),
        (Row(1, 5001, 5000, "decode"), "decode"),
        (Row(100, 100, 5000, "image tokens"), "image tokens"),
    ],
)
def test_which_rows_take_stem(row: Row, reason: str | None) -> None:
    assert row.dense_reason(min_query_len=32, dense_limit=4096) == reason


@pytest.mark.parametrize("chosen", [[0], [1, 2], [2], [0, 1, 2], [0, 2], [0, 3], [1, 3]])
def test_tokens_and_pages_are_those_of_the_chosen_rows(chosen: list[int]) -> None:
    rows = [Row(3, 9, 20), Row(1, 5, 5), Row(4, 4, 8), Row(2, 12, 7)]
    owner = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 3, 3])
    pages = torch.arange(8, dtype=torch.int32).view(4, 2)
    sparse = SparseRows.of(rows, chosen, pages)
    assert owner[sparse.tokens].tolist() == [i for i in chosen for _ in range(rows[i].q_len)]
    assert torch.equal(sparse.pages, pages[chosen])
    assert [b - a for a, b in zip(sparse.q_starts, sparse.q_starts[1:], strict=False)] == [rows[i].q_len for i in chosen]
    assert [b - a for a, b in zip(sparse.k_starts, sparse.k_starts[1:], strict=False)] == [rows[i].kv_len for i in chosen]
    assert sparse.prompt_lens == tuple((20, 5, 8, 12)[i] for i in chosen)
    neighbours = chosen == list(range(chosen[0], chosen[-1] + 1))
    assert isinstance(token_index(rows, chosen, pages.device), slice) == neighbours


@pytest.mark.parametrize(
    ("config", "is_exact"),
    [
        (StemConfig(block_size=16, stride=4, dense_below=0), True),
        (StemConfig(block_size=16, stride=4, dense_below=0, forced="extra"), False),
        (StemConfig(keep="mass", block_size=16, query_pool=4, key_pool=4, dense_below=0), False),
    ],
    ids=["inside", "extra", "mass"],
)
def test_counters_tell_what_the_selection_keeps(config: StemConfig, is_exact: bool) -> None:
    count, kept, causal = Counters(), 0, 0
    for q_len, kv_len, prompt_len in ((500, 500, 500), (77, 350, 500), (64, 64, 300), (33, 1000, 1000)):
        q, k = torch.randn(1, q_len, 2, 8), torch.randn(1, kv_len, 1, 8)
        selection = select_blocks(q, k, k, config=config, prompt_len=prompt_len)
        kept += int(selection.counts[0, 0].sum())
        causal += round(int(selection.counts.sum()) / selection.density()) // 2
        count.count_sparse([Row(q_len, kv_len, prompt_len)], config)
    assert (count.sparse_rows, count.sparse_tokens, count.causal_blocks) == (4, 674, causal)
    assert count.is_bound != is_exact
    assert count.kept_blocks == kept if is_exact else count.kept_blocks >= kept
    assert ("at most" in str(count)) != is_exact


def test_counters_read_well_and_start_again() -> None:
    count = Counters()
    assert count.density == 1
    assert str(count).endswith("rows left to the host: none")
    count.count_sparse([Row(64, 64, 64)], StemConfig(block_size=16, stride=4, local_blocks=1, tail_blocks=0))
    count.dense_rows.update(["decode", "decode", "short prompt"])
    plain: dict[str, Any] = json.loads(json.dumps(count.to_dict()))
    assert plain == {
        "sparse_rows": 1, "sparse_tokens": 64, "kept_blocks": 7, "causal_blocks": 10, "density": 0.7, "is_bound": False,
        "dense_rows": {"decode": 2, "short prompt": 1},
    }  # fmt: skip
    assert str(count) == (
        "1 rows (64 tokens) took Stem and read 0.700 of their causal blocks; rows left to the host: 2 decode, 1 short prompt"
    )
    count.reset()
    assert count == Counters()
