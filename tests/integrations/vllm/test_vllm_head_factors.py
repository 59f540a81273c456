"""A calibrated config in vLLM: each layer keeps what its own row of head_factors says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from stem_attention import StemConfig, ops, select_blocks
from stem_attention.integrations.vllm import counters

MASS = {"preset": "mass", "dense_below": 256, "min_query_len": 32, "tail_blocks": 1}
# Forced blocks alone, blocks as by share, every block: each head of each layer keeps something else.
FACTORS = ((1e6, 1.0, 1e-6, 4.0), (4.0, 1e-6, 1e6, 1.0))
BLOCKS = 1500 // 64 + 1

Tokens = Callable[..., list[list[int]]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[StemConfig, list[int]]]:
    """Every sparse call: its config, and the block pairs that each head keeps."""
    seen: list[tuple[StemConfig, list[int]]] = []
    forward = ops.forward_varlen

    def spy(q: Any, k: Any, v: Any, q_starts: Any, k_starts: Any, pages: Any, text: str, *rest: Any) -> Any:
        config = StemConfig.from_json(text)
        counts = select_blocks(q[None], k[None], v[None], config=config, scale=rest[0], prompt_len=rest[1][0]).counts
        seen.append((config, counts.sum((0, 2)).tolist()))
        return forward(q, k, v, q_starts, k_starts, pages, text, *rest)

    monkeypatch.setattr(ops, "forward_varlen", spy)
    return seen


def test_each_layer_keeps_what_its_own_factors_say(
    llama: Path, engine: Any, prompts: Tokens, generate: Tokens, calls: list[tuple[StemConfig, list[int]]]
) -> None:
    llm = engine(llama, {**MASS, "head_factors": FACTORS})
    tokens = generate(llm, prompts(1500))
    assert [config.head_factors for config, _ in calls] == [(row,) for row in FACTORS]
    (_, first), (_, second) = calls
    assert first[0] == second[2] < first[1] < first[2] == second[1] == BLOCKS * (BLOCKS + 1) // 2
    assert counters()["is_bound"]
    calls.clear()
    assert generate(engine(llama, {**MASS, "head_factors": FACTORS[::-1]}), prompts(1500)) != tokens
    assert [config.head_factors for config, _ in calls] == [(row,) for row in FACTORS[::-1]]


def test_chunks_of_mixed_steps_are_read_by_them_too(
    llama: Path, engine: Any, prompts: Tokens, generate: Tokens, calls: list[tuple[StemConfig, list[int]]]
) -> None:
    keep_all = tuple((1e-9,) * 4 for _ in range(2))
    asked = prompts(1500, 900, 37)
    expected = generate(engine(llama), asked)
    assert generate(engine(llama, {**MASS, "head_factors": keep_all}, max_num_batched_tokens=300), asked) == expected
    assert len(calls) >= 2 * 8


@pytest.mark.parametrize("rows", [1, 2])
def test_factors_of_one_change_nothing(rows: int, llama: Path, engine: Any, prompts: Tokens, generate: Tokens) -> None:
    plain = generate(engine(llama, MASS), prompts(1500))
    assert generate(engine(llama, {**MASS, "head_factors": ((1.0,) * 4,) * rows}), prompts(1500)) == plain
    assert generate(engine(llama), prompts(1500)) != plain, "what is left out matters to this model"


def test_a_step_costs_no_new_configs(
    llama: Path, engine: Any, prompts: Tokens, generate: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = engine(llama, {**MASS, "head_factors": FACTORS}, max_num_batched_tokens=300)
    generate(llm, prompts(1500))
    made: list[StemConfig] = []
    check = StemConfig.__post_init__
    monkeypatch.setattr(StemConfig, "__post_init__", lambda config: made.append(config) or check(config))
    generate(llm, prompts(1500, 900, seed=2))
    assert counters()["sparse_rows"] > 5
    assert not made


@pytest.mark.parametrize("shape", [(3, 4), (2, 8)])
def test_factors_of_another_model_are_refused(shape: tuple[int, int], llama: Path, engine: Any) -> None:
    rows, heads = shape
    message = (
        "head_factors: expected 2 x 4 of them (layers x query heads of this model), or 1 x 4 for every layer, "
        f"got {rows} x {heads}; run stem-attention calibrate on this model"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        engine(llama, {**MASS, "head_factors": ((1.0,) * heads,) * rows})
