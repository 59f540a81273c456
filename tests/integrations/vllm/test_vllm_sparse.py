"""What takes Stem in vLLM reads what the schedule says, for the length of the whole prompt; the rest is left to the host."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from stem_attention import StemConfig, ops, select_blocks
from stem_attention.integrations.vllm import counters

SPARSE = {"block_size": 32, "stride": 8, "dense_below": 256, "tail_blocks": 1, "min_query_len": 32}

Tokens = Callable[..., list[list[int]]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Every sparse call: its prompt lengths, keys so far, and the block pairs that selecting on its tensors keeps."""
    seen: list[dict[str, Any]] = []
    forward = ops.forward_varlen

    def spy(q: Any, k: Any, v: Any, q_starts: Any, k_starts: Any, pages: Any, config: str, scale: float, lens: Any, *rest: Any):
        kept = causal = 0
        for i, (low, high) in enumerate(pairwise(q_starts)):
            keys = slice(k_starts[i], k_starts[i + 1])
            selection = select_blocks(
                q[None, low:high], k[None, keys], v[None, keys], config=StemConfig.from_json(config), scale=scale,
                prompt_len=lens[i],
            )  # fmt: skip
            kept += int(selection.counts.sum())
            causal += round(int(selection.counts.sum()) / selection.density())
        seen.append({"lens": tuple(lens), "keys": [b - a for a, b in pairwise(k_starts)], "kept": kept, "causal": causal})
        return forward(q, k, v, q_starts, k_starts, pages, config, scale, lens, *rest)

    monkeypatch.setattr(ops, "forward_varlen", spy)
    return seen


@pytest.mark.parametrize("budget", [4096, 177], ids=["one shot", "odd chunks"])
def test_density_is_that_of_the_selection(
    budget: int, llama: Path, engine: Any, prompts: Tokens, generate: Tokens, calls: list[dict[str, Any]]
) -> None:
    generate(engine(llama, SPARSE, max_num_batched_tokens=budget), prompts(1500, 900, 400))
    count, layers_and_heads = counters(), 2 * 4
    assert sum(call["kept"] for call in calls) == count["kept_blocks"] * layers_and_heads
    assert sum(call["causal"] for call in calls) == count["causal_blocks"] * layers_and_heads
    assert 0.2 < count["density"] < 0.6


def test_chunks_keep_what_the_whole_prompt_keeps(
    llama: Path, engine: Any, prompts: Tokens, generate: Tokens, calls: list[dict[str, Any]]
) -> None:
    prompt = prompts(1500)
    one_shot = generate(engine(llama, SPARSE), prompt)
    whole = counters()["kept_blocks"]
    calls.clear()
    assert generate(engine(llama, SPARSE, max_num_batched_tokens=256), prompt) == one_shot
    assert counters()["kept_blocks"] == 2 * whole
    assert [call["keys"] for call in calls[::2]] == [[256], [512], [768], [1024], [1280], [1500]]
    assert {call["lens"] for call in calls} == {(1500,)}, "every chunk knows the length of the whole prompt"
    assert generate(engine(llama), prompt) != one_shot, "and what is left out matters to this model"


def test_short_prompts_short_chunks_and_answers_are_the_hosts_and_counted(
    llama: Path, engine: Any, prompts: Tokens, generate: Tokens
) -> None:
    generate(engine(llama, SPARSE, max_num_batched_tokens=300), prompts(255), tokens=5)
    assert counters() == {**counters(), "sparse_rows": 0, "dense_rows": {"short prompt": 1, "decode": 4}}
    llm = engine(llama, {**SPARSE, "min_query_len": 50}, max_num_batched_tokens=300)
    generate(llm, prompts(349), tokens=5)
    assert counters()["sparse_tokens"] == 300
    assert counters()["dense_rows"] == {"short prompt": 1, "short chunk": 1, "decode": 8}


def test_the_first_layers_can_be_left_dense(
    llama: Path, engine: Any, prompts: Tokens, generate: Tokens, calls: list[dict[str, Any]]
) -> None:
    llm = engine(llama, {**SPARSE, "dense_layers": 1})
    generate(llm, prompts(500))
    assert len(calls) == 1


def test_sliding_layers_of_a_mixed_model_are_the_hosts(
    models: Callable[..., Path], engine: Any, prompts: Tokens, generate: Tokens, calls: list[dict[str, Any]]
) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = models("Gemma3TextConfig", num_hidden_layers=3, layer_types=kinds, sliding_window=96)
    keep_all = {**SPARSE, "dense_below": 0, "ratio_short": 1.0, "ratio_long": 1.0, "decay": 1.0}
    expected = generate(engine(model, max_num_batched_tokens=200), prompts(500, 300))
    for hybrid in (True, False):  # without it, all layers share one group of the KV cache
        calls.clear()
        llm = engine(model, keep_all, max_num_batched_tokens=200, disable_hybrid_kv_cache_manager=not hybrid)
        assert generate(llm, prompts(500, 300)) == expected
        assert 4 <= len(calls) <= 6, "one sparse layer in each step"
