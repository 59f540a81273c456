"""A calibrated policy in vLLM: each layer keeps what its own row of head_factors says."""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from stem_attention import Mass, select_blocks
from stem_attention.integrations.vllm import counters

from .served import generate, prompts

# Forced blocks alone, blocks as by share, every block: each head of each layer keeps something else.
FACTORS = ((1e6, 1.0, 1e-6, 4.0), (4.0, 1e-6, 1e6, 1.0))
BLOCKS = 1500 // 64 + 1


def mass(factors: Any = None) -> dict[str, Any]:
    """Settings that keep by mass, with factors."""
    return {"policy": Mass(tail_blocks=1, head_factors=factors).to_dict(), "dense_below": 256, "min_query_len": 32}


def kept(call: Any) -> list[int]:
    """Block pairs that each head of a call keeps; it holds one prompt."""
    q, k, v, batch = call.q, call.k, call.v, call.batch
    selection = select_blocks(q[None], k[None], v[None], policy=call.policy, scale=call.scale, prompt_len=batch.prompt_lens[0])
    return selection.counts.sum((0, 2)).tolist()


def test_each_layer_keeps_what_its_own_factors_say(llama, engine, calls):
    tokens = generate(engine(llama, mass(FACTORS)), prompts(1500))
    assert [call.policy.head_factors for call in calls] == [(row,) for row in FACTORS]
    first, second = map(kept, calls)
    assert first[0] == second[2] < first[1] < first[2] == second[1] == BLOCKS * (BLOCKS + 1) // 2
    assert counters()["kept_blocks"] == sum(first) + sum(second)
    calls.clear()
    assert generate(engine(llama, mass(FACTORS[::-1])), prompts(1500)) != tokens
    assert [call.policy.head_factors for call in calls] == [(row,) for row in FACTORS[::-1]]


def test_chunks_of_mixed_steps_are_read_by_them_too(llama, engine, calls):
    keep_all = tuple((1e-9,) * 4 for _ in range(2))
    asked = prompts(1500, 900, 37)
    expected = generate(engine(llama), asked)
    assert generate(engine(llama, mass(keep_all), max_num_batched_tokens=300), asked) == expected
    assert len(calls) >= 2 * 8


@pytest.mark.parametrize("rows", [1, 2])
def test_factors_of_one_change_nothing(rows, llama, engine):
    plain = generate(engine(llama, mass()), prompts(1500))
    assert generate(engine(llama, mass(((1.0,) * 4,) * rows)), prompts(1500)) == plain
    assert generate(engine(llama), prompts(1500)) != plain, "what is left out matters to this model"


def test_a_step_makes_no_new_policies(llama, engine, monkeypatch):
    llm = engine(llama, mass(FACTORS), max_num_batched_tokens=300)
    generate(llm, prompts(1500))
    made: list[Mass] = []
    check = Mass.__post_init__
    monkeypatch.setattr(Mass, "__post_init__", lambda policy: made.append(policy) or check(policy))
    generate(llm, prompts(1500, 900, seed=2))
    assert counters()["sparse_rows"] > 5
    assert not made


@pytest.mark.parametrize("shape", [(3, 4), (2, 8)])
def test_factors_of_another_model_are_refused(shape, llama, engine):
    rows, heads = shape
    message = (
        "head_factors: expected 2 x 4 of them (layers x query heads of this model), or 1 x 4 for every layer, "
        f"got {rows} x {heads}; run stem-attention calibrate on this model"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        engine(llama, mass(((1.0,) * heads,) * rows))
