"""What takes Stem in vLLM reads what the schedule says, for the length of the whole prompt; the rest is left to the host."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from stem_attention import select_blocks
from stem_attention.integrations.vllm import counters

from .served import KEEP_ALL, generate, prompts

SPARSE = {"policy": "stem:block_size=32,stride=8,tail_blocks=1", "dense_below": 256, "min_query_len": 32}


def selections(call: Any) -> list[Any]:
    """Select as a sparse call does, one sequence after the other."""
    parts = [call.only(i) for i in range(call.batch.sequences)]
    return [select_blocks(p.q, p.k, p.v, policy=p.policy, scale=p.scale, prompt_len=p.prompt_len) for p in parts]


@pytest.mark.parametrize("budget", [4096, 177], ids=["one shot", "odd chunks"])
def test_density_is_that_of_the_selection(budget, llama, engine, calls):
    generate(engine(llama, SPARSE, max_num_batched_tokens=budget), prompts(1500, 900, 400))
    count = counters()
    made = [selection for call in calls for selection in selections(call)]
    assert sum(int(selection.counts.sum()) for selection in made) == count["kept_blocks"]
    assert sum(selection.grid.causal_pairs for selection in made) * 4 == count["causal_blocks"]
    assert 0.2 < count["density"] < 0.6


def test_chunks_keep_what_the_whole_prompt_keeps(llama, engine, calls):
    prompt = prompts(1500)
    one_shot = generate(engine(llama, SPARSE), prompt)
    whole = counters()["kept_blocks"]
    calls.clear()
    assert generate(engine(llama, SPARSE, max_num_batched_tokens=256), prompt) == one_shot
    assert counters()["kept_blocks"] == 2 * whole
    assert [call.batch.k_starts[1] for call in calls[::2]] == [256, 512, 768, 1024, 1280, 1500]
    assert {call.batch.prompt_lens for call in calls} == {(1500,)}, "every chunk knows the length of the whole prompt"
    assert generate(engine(llama), prompt) != one_shot, "and what is left out matters to this model"


def test_short_prompts_short_chunks_and_answers_are_the_hosts_and_counted(llama, engine):
    generate(engine(llama, SPARSE, max_num_batched_tokens=300), prompts(255), tokens=5)
    assert counters() == {**counters(), "sparse_rows": 0, "dense_rows": {"short prompt": 1, "decode": 4}}
    llm = engine(llama, {**SPARSE, "min_query_len": 50}, max_num_batched_tokens=300)
    generate(llm, prompts(349), tokens=5)
    assert counters()["sparse_tokens"] == 300
    assert counters()["dense_rows"] == {"short prompt": 1, "short chunk": 1, "decode": 8}


def test_the_first_layers_can_be_left_dense(llama, engine, calls):
    llm = engine(llama, {**SPARSE, "dense_layers": 1})
    generate(llm, prompts(500))
    assert len(calls) == 1


def test_a_window_that_no_request_outgrows_is_none(models, engine, calls):
    model = models("MistralConfig", sliding_window=4096)  # the engine's max_model_len
    expected = generate(engine(model), prompts(500, 300))
    assert generate(engine(model, KEEP_ALL, max_num_batched_tokens=200), prompts(500, 300)) == expected
    assert counters()["sparse_tokens"] > 700
    assert len(calls) >= 2 * 4


def test_sliding_layers_of_a_mixed_model_are_the_hosts(models, engine, calls):
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = models("Gemma3TextConfig", num_hidden_layers=3, layer_types=kinds, sliding_window=96)
    expected = generate(engine(model, max_num_batched_tokens=200), prompts(500, 300))
    for hybrid in (True, False):  # without it, all layers share one group of the KV cache
        calls.clear()
        llm = engine(model, KEEP_ALL, max_num_batched_tokens=200, disable_hybrid_kv_cache_manager=not hybrid)
        assert generate(llm, prompts(500, 300)) == expected
        assert 4 <= len(calls) <= 6, "one sparse layer in each step"
