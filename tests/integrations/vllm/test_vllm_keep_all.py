"""A policy that keeps everything gives vLLM's own tokens, however the prompts arrive."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from stem_attention.integrations.serving import rows as serving_rows
from stem_attention.integrations.vllm import counters, reset_counters
from stem_attention.integrations.vllm import host as vllm_host

KEEP_ALL = {"policy": "stem:block_size=64,ratio_short=1,ratio_long=1,decay=1", "dense_below": 0, "min_query_len": 32}
LENGTHS = (700, 37, 1001, 300, 129)

Tokens = Callable[..., list[list[int]]]


@pytest.fixture
def mixed_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the host beside sparse ones, one entry for each such step."""
    seen: list[int] = []
    make = vllm_host.StemBuilder._dense

    def spy(self: Any, common: Any, rows: Any, chosen: Any) -> Any:
        dense = make(self, common, rows, chosen)
        if dense is not None:
            seen.append(len(chosen))
        return dense

    monkeypatch.setattr(vllm_host.StemBuilder, "_dense", spy)
    return seen


@pytest.fixture(scope="module")
def expected(llama: Path, prompts: Tokens, generate: Tokens) -> list[list[int]]:
    import vllm

    reset_counters()
    llm = vllm.LLM(
        str(llama), dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=4096, max_num_seqs=4,
        enable_prefix_caching=False,
    )  # fmt: skip
    tokens = generate(llm, prompts(*LENGTHS))
    assert not counters()["sparse_rows"]
    assert not counters()["dense_rows"], "installed but not asked for, Stem does nothing"
    assert len({token for answer in tokens for token in answer}) > 20
    return tokens


@pytest.mark.parametrize(
    ("budget", "options"),
    [(4096, {}), (97, {}), (211, {"block_size": 32}), (333, {"dtype": "bfloat16"})],
    ids=["one shot", "odd chunks", "small pages", "bfloat16"],
)
def test_tokens_are_the_hosts(
    budget: int, options: dict[str, Any], llama: Path, expected: Any, engine: Any, prompts: Tokens, generate: Tokens,
    mixed_steps: list[int],
) -> None:  # fmt: skip
    llm = engine(llama, KEEP_ALL, max_num_batched_tokens=budget, **options)
    tokens = generate(llm, prompts(*LENGTHS))
    if "dtype" in options:  # rounding may turn a close choice, but not the first token
        assert [answer[0] for answer in tokens] == [answer[0] for answer in expected]
    else:
        assert tokens == expected
    count = counters()
    short = count["dense_rows"].get("short chunk", 0)
    assert sum(LENGTHS) - 31 * short <= count["sparse_tokens"] <= sum(LENGTHS) - short
    assert count["sparse_rows"] >= sum(LENGTHS) // budget
    assert count["density"] == 1
    assert mixed_steps or budget > sum(LENGTHS), "some prompts were read beside others' answers"


def test_a_cached_prefix_is_read_from_the_cache(
    llama: Path, engine: Any, prompts: Tokens, generate: Tokens, mixed_steps: list[int]
) -> None:
    first, tail = prompts(700, 90)
    again = [first[:640] + tail, first[:300] + tail, first]
    expected = generate(engine(llama), again)
    llm = engine(llama, KEEP_ALL, enable_prefix_caching=True, block_size=32, max_num_batched_tokens=251)
    generate(llm, [first])
    before = counters()["sparse_tokens"]
    assert generate(llm, again) == expected
    assert counters()["sparse_tokens"] - before <= sum(map(len, again)) - 640 - 288 - 672
    assert counters()["sparse_tokens"] - before >= 2 * 90


def test_a_preempted_request_reads_its_answer_again(llama: Path, engine: Any, prompts: Tokens, generate: Tokens) -> None:
    asked = prompts(700, 600, 500)
    expected = generate(engine(llama), asked, tokens=200)
    llm = engine(llama, KEEP_ALL, block_size=128, num_gpu_blocks_override=17, max_model_len=1024)
    assert generate(llm, asked, tokens=200) == expected
    assert counters()["sparse_tokens"] > sum(map(len, asked)) + 500, "some prompt was read twice"


def test_a_mixture_of_experts(models: Callable[..., Path], engine: Any, prompts: Tokens, generate: Tokens) -> None:
    model = models("MixtralConfig", num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
    expected = generate(engine(model), prompts(700, 300))
    assert generate(engine(model, KEEP_ALL, max_num_batched_tokens=222), prompts(700, 300)) == expected
    assert counters()["sparse_tokens"] > 900


def test_rows_out_of_order_are_gathered(
    llama: Path, expected: Any, engine: Any, prompts: Tokens, generate: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are neighbours nearly always; a rule that leaves every other request to the host scatters them."""
    judge = serving_rows.Row.dense_reason

    def scattered(row: Any, *limits: int) -> str | None:
        return "scattered" if row.prompt_len in (700, 1001, 129) else judge(row, *limits)

    monkeypatch.setattr(serving_rows.Row, "dense_reason", scattered)
    indices: list[type] = []
    of = serving_rows.SparseRows.of
    monkeypatch.setattr(serving_rows.SparseRows, "of", lambda *args: indices.append(type((rows := of(*args)).tokens)) or rows)
    llm = engine(llama, KEEP_ALL, max_num_seqs=5)
    assert generate(llm, prompts(*LENGTHS)) == expected
    assert counters()["dense_rows"]["scattered"] >= 3
    assert any(kind is not slice for kind in indices)
