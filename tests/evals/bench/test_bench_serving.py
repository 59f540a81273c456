"""bench --suite serving: the batches it makes, and the checks."""

from functools import partial

import pytest
import torch
from tests.evals.records import bench_setup

from stem_attention import Stem, select_blocks
from stem_attention.backends.dense import dense_attention
from stem_attention.testing import exact_attention, make_qkv
from stem_evals.bench import serving, serving_dense
from stem_evals.bench.checks import WrongResultError
from stem_evals.bench.serving_batches import PAGE_SIZE, Chunk, build_steps, chunked_prefill, mixed_step

POLICY = Stem(block_size=16)
setup = partial(bench_setup, POLICY, dense_below=100, dense=False)


def test_chunked_prefill_reads_every_prompt_in_order_at_different_stages():
    scenario = chunked_prefill(250)
    assert len(scenario.steps) == 7
    for request in range(8):
        chunks = [chunk for step in scenario.steps for chunk in step if chunk.request == request]
        assert chunks == [Chunk(request, low, min(low + 63, 250)) for low in range(0, 250, 63)]
    assert {chunk.low for chunk in scenario.steps[3]} == {0, 63, 126, 189}


def test_a_mixed_step_spans_two_orders_of_magnitude_and_starts_anywhere():
    scenario = mixed_step(131072)
    assert (min(scenario.prompts), max(scenario.prompts), len(scenario.prompts)) == (1024, 131072, 64)
    (step,) = scenario.steps
    assert all(0 <= chunk.low < chunk.high <= scenario.prompts[chunk.request] for chunk in step)
    assert all(chunk.high - chunk.low <= 2048 for chunk in step)
    assert len({chunk.low % 128 for chunk in step}) > 10


def test_page_tables_lead_through_scrambled_pages_to_the_contiguous_keys():
    scenario = mixed_step(400, requests=5)
    ((step),) = build_steps(scenario, setup(seed=3))
    _, key_cache, value_cache, q_starts, k_starts, max_q, max_k = step.packed
    assert key_cache.shape == (value_cache.shape[0], PAGE_SIZE, 1, 32)
    assert q_starts.dtype == k_starts.dtype == step.page_table.dtype == torch.int32
    for i, (chunk, part) in enumerate(zip(scenario.steps[0], step.parts, strict=True)):
        pages = step.page_table[i, : -(-chunk.high // PAGE_SIZE)].long()
        for cache, contiguous in ((key_cache, part.k), (value_cache, part.v)):
            assert torch.equal(cache[pages].flatten(0, 1)[: chunk.high], contiguous[0])
        assert k_starts.diff()[i] == part.k.shape[1] == chunk.high
        assert q_starts.diff()[i] == part.q.shape[1] == chunk.high - chunk.low
        assert part.prompt_len == scenario.prompts[i]
    assert (max_q, max_k) == (q_starts.diff().max(), k_starts.diff().max())
    used = step.page_table[0, : -(-scenario.steps[0][0].high // PAGE_SIZE)]
    assert not torch.equal(used.sort().values, used)


def test_density_is_that_of_the_selection():
    policy = Stem(block_size=10, stride=5)  # chunks of 50 end on block borders
    steps = build_steps(chunked_prefill(200, requests=1), setup())
    q, k, v = make_qkv(1, 200, 200, 2, 1, 32)
    assert serving.density(steps, policy, 0) == pytest.approx(select_blocks(q, k, v, policy=policy).density())
    assert serving.density(steps, policy, 201) == 1


def test_dense_attention_passes_the_check_that_a_wrong_one_does_not():
    steps = build_steps(chunked_prefill(256), setup())
    ((_, build),) = serving_dense.dense_runs(steps).items()
    outs = build()()

    def problem(outs, limit):
        return serving.check_steps(outs, steps, POLICY, limit, 0).problem(torch.float32)

    assert problem(outs, None) is None
    assert problem(outs, 100) is not None  # dense is no sparse answer
    assert problem([out * 1.01 for out in outs], None) is not None


def test_cached_and_own_keys_are_joined_by_their_log_sum_exps(monkeypatch):
    def masked(q, k, v, causal):
        seen = torch.ones(1, 1, q.shape[1], k.shape[1], dtype=torch.bool)
        out, lse = exact_attention(q, k, v, seen.tril() if causal else seen)  # cuDNN's mask starts at the first key
        return out.transpose(1, 2).to(q.dtype), lse.float()

    monkeypatch.setattr(serving_dense, "_cudnn", masked)
    for queries in (70, 200):
        q, k, v = make_qkv(1, queries, 200, 2, 1, 32)
        expected = dense_attention(q, k, v, 32**-0.5)
        torch.testing.assert_close(serving_dense.joined(q, k, v), expected, atol=1e-5, rtol=1e-5)


def test_a_wrong_result_is_not_timed(monkeypatch):
    right = serving.stem_attention_varlen
    monkeypatch.setattr(serving, "stem_attention_varlen", lambda *args, **named: right(*args, **named) * 1.01)
    with pytest.raises(WrongResultError, match="wrong result at 8 prompts of 256 in chunks of 64"):
        serving.run_serving(setup())
