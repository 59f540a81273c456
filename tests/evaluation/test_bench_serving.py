"""bench --suite serving: the batches it makes, the checks, what it prints."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from stem_attention import StemConfig, select_blocks
from stem_attention.backends.dense import dense_attention
from stem_attention.cli import main
from stem_attention.evaluation import bench_serving, bench_serving_dense
from stem_attention.evaluation.bench_serving import run_serving
from stem_attention.evaluation.bench_serving_batches import PAGE_SIZE, Chunk, build_load, chunked_prefill, mixed_step
from stem_attention.evaluation.bench_serving_dense import WHOLE, dense_runs
from stem_attention.evaluation.bench_shapes import Shape
from stem_attention.evaluation.bench_suites import WrongResultError
from stem_attention.testing import exact_attention, make_qkv

SHAPE = Shape(256, 2, 1, 32, torch.float32, torch.device("cpu"))
CONFIG = StemConfig(block_size=16, dense_below=100)


def test_chunked_prefill_reads_every_prompt_in_order_at_different_stages() -> None:
    scenario = chunked_prefill(250)
    assert scenario.whole
    assert len(scenario.steps) == 7
    for request in range(8):
        chunks = [chunk for step in scenario.steps for chunk in step if chunk.request == request]
        assert chunks == [Chunk(request, low, min(low + 63, 250)) for low in range(0, 250, 63)]
    assert {chunk.low for chunk in scenario.steps[3]} == {0, 63, 126, 189}


def test_a_mixed_step_spans_two_orders_of_magnitude_and_starts_anywhere() -> None:
    scenario = mixed_step(131072)
    assert (min(scenario.prompts), max(scenario.prompts), len(scenario.prompts)) == (1024, 131072, 64)
    (step,) = scenario.steps
    assert all(0 <= chunk.low < chunk.high <= scenario.prompts[chunk.request] for chunk in step)
    assert all(chunk.high - chunk.low <= 2048 for chunk in step)
    assert len({chunk.low % 128 for chunk in step}) > 10
    assert not scenario.whole


def test_metadata_lead_through_scrambled_pages_to_the_contiguous_keys() -> None:
    scenario = mixed_step(400, requests=5)
    load = build_load(scenario, SHAPE, seed=3)
    assert load.key_cache.shape == (load.value_cache.shape[0], PAGE_SIZE, 1, 32)
    (step,) = load.steps
    assert step.query_start_loc.dtype == step.seq_starts.dtype == step.block_table.dtype == torch.int32
    assert step.prompt_lens == list(scenario.prompts)
    for i, chunk in enumerate(step.chunks):
        pages = step.block_table[i, : -(-chunk.high // PAGE_SIZE)].long()
        for cache, contiguous in ((load.key_cache, load.keys), (load.value_cache, load.values)):
            assert torch.equal(cache[pages].flatten(0, 1)[: chunk.high], contiguous[chunk.request][: chunk.high])
        assert step.seq_starts.diff()[i] == chunk.high
        assert step.query_start_loc.diff()[i] == chunk.high - chunk.low
    assert not torch.equal(step.block_table[0].sort().values, step.block_table[0])


def test_density_is_that_of_the_selection() -> None:
    scenario = chunked_prefill(200, requests=1)
    q, k, v = make_qkv(1, 200, 200, 2, 1, 32)
    config = StemConfig(block_size=10, stride=5)  # chunks of 50 end on block borders
    assert scenario.density(config, 0) == pytest.approx(select_blocks(q, k, v, config=config).density())
    assert scenario.density(config, 201) == 1


def test_dense_attention_passes_the_check_that_a_wrong_one_does_not() -> None:
    load = build_load(chunked_prefill(256), SHAPE, seed=0)
    ((_, build),) = dense_runs(load, chunked_prefill(256)).items()
    outs = build()()
    assert bench_serving._check(outs, load, CONFIG, None, 0).problem(torch.float32) is None
    assert bench_serving._check(outs, load, CONFIG, 100, 0).problem(torch.float32) is not None  # dense is no sparse answer
    assert bench_serving._check([out * 1.01 for out in outs], load, CONFIG, None, 0).problem(torch.float32) is not None


def test_cached_and_own_keys_are_joined_by_their_log_sum_exps(monkeypatch: pytest.MonkeyPatch) -> None:
    def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
        seen = torch.ones(1, 1, q.shape[1], k.shape[1], dtype=torch.bool)
        out, lse = exact_attention(q, k, v, seen.tril() if causal else seen)  # cuDNN's mask starts at the first key
        return out.transpose(1, 2).to(q.dtype), lse.float()

    monkeypatch.setattr(bench_serving_dense, "_cudnn_call", masked)
    for queries in (70, 200):
        q, k, v = make_qkv(1, queries, 200, 2, 1, 32)
        expected = dense_attention(q, k, v, 32**-0.5)
        torch.testing.assert_close(bench_serving_dense._cudnn(q, k, v), expected, atol=1e-5, rtol=1e-5)


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench_serving.stem_attention_varlen
    monkeypatch.setattr(bench_serving, "stem_attention_varlen", lambda *args, **named: right(*args, **named) * 1.01)
    with pytest.raises(WrongResultError, match="wrong result for 8 prompts of 256 in chunks of 64"):
        run_serving(chunked_prefill(256), SHAPE, CONFIG, repeats=1, seed=0, dense=False, on_step=lambda: None)


def test_the_suite_reports_both_scenarios(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--suite", "serving", "--lengths", "256", "--heads", "2", "--kv-heads", "1", "--head-dim", "32"]
    arguments += ["--repeats", "1", "--set", "dense_below=100", "--set", "block_size=16"]
    assert main(["bench", *arguments, "--json"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    chunked, mixed = answer["results"]
    assert (answer["suite"], answer["page_size"]) == ("serving", 16)
    assert chunked["scenario"] == "8 prompts of 256 in chunks of 64"
    assert mixed["scenario"] == "64 prompts of 8 to 1024, one step"
    for result in (chunked, mixed):
        medians = result["medians"]
        assert medians.keys() == {"dense SDPA", "Stem"}
        assert result["ratios"] == {"ratio": pytest.approx(medians["dense SDPA"] / medians["Stem"])}
        assert 0.1 < result["density"] < 1
        assert result["check"]["error"] < 1e-5
        assert result["left_out"] == {}
    assert main(["bench", *arguments, "--no-dense"]) == 0
    out = capsys.readouterr().out
    assert "8 prompts of 256" in out
    assert "dense SDPA" not in out
    assert WHOLE not in out
    assert main(["bench", *arguments, "--plot", "x.png"]) == 1
    assert "suite serving draws none" in capsys.readouterr().err
