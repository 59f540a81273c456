"""A policy that keeps everything gives vLLM's own tokens, however the prompts arrive."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from safetensors.torch import save_file
from vllm.distributed.parallel_state import destroy_model_parallel
from vllm.lora.request import LoRARequest

from stem_attention.integrations.serving import rows as serving_rows
from stem_attention.integrations.vllm import counters, reset_counters
from stem_attention.integrations.vllm import host as vllm_host

from .served import KEEP_ALL, SIZES, generate, prompts

LENGTHS = (700, 37, 1001, 300, 129)


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
def expected(llama, engine):
    reset_counters()
    tokens = generate(engine(llama), prompts(*LENGTHS))
    assert not counters()["sparse_rows"]
    assert not counters()["dense_rows"], "installed but not asked for, Stem does nothing"
    assert len({token for answer in tokens for token in answer}) > 20
    return tokens


@pytest.mark.parametrize(
    ("budget", "options"),
    [(4096, {}), (97, {}), (211, {"block_size": 32}), (333, {"dtype": "bfloat16"})],
    ids=["one shot", "odd chunks", "small pages", "bfloat16"],
)
def test_tokens_are_the_hosts(budget, options, llama, expected, engine, mixed_steps):
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


def test_a_cached_prefix_is_read_from_the_cache(llama, engine, mixed_steps):
    first, tail = prompts(700, 90)
    again = [first[:640] + tail, first[:300] + tail, first]
    expected = generate(engine(llama), again)
    llm = engine(llama, KEEP_ALL, enable_prefix_caching=True, block_size=32, max_num_batched_tokens=251)
    generate(llm, [first])
    before = counters()["sparse_tokens"]
    assert generate(llm, again) == expected
    assert counters()["sparse_tokens"] - before <= sum(map(len, again)) - 640 - 288 - 672
    assert counters()["sparse_tokens"] - before >= 2 * 90


def test_a_preempted_request_reads_its_answer_again(llama, engine):
    asked = prompts(700, 600, 500)
    expected = generate(engine(llama), asked, tokens=200)
    llm = engine(llama, KEEP_ALL, block_size=128, num_gpu_blocks_override=17, max_model_len=1024)
    assert generate(llm, asked, tokens=200) == expected
    assert counters()["sparse_tokens"] > sum(map(len, asked)) + 500, "some prompt was read twice"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a random adapter for the random Llama: low-rank changes of its queries and keys."""
    generator, path = torch.Generator().manual_seed(0), tmp_path_factory.mktemp("adapter")
    changes = {}
    for layer in range(2):
        for name, width in (("q_proj", 128), ("k_proj", 64)):
            for factor, shape in (("A", (8, SIZES["hidden_size"])), ("B", (width, 8))):
                key = f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_{factor}.weight"
                changes[key] = torch.randn(shape, generator=generator) * 0.3
    save_file(changes, path / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj"], "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(fields))
    return path


def test_a_mixture_of_experts(models, engine):
    destroy_model_parallel()  # experts have a process group too, which engines of other models have not made
    model = models("MixtralConfig", num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
    expected = generate(engine(model), prompts(700, 300))
    assert generate(engine(model, KEEP_ALL, max_num_batched_tokens=222), prompts(700, 300)) == expected
    assert counters()["sparse_tokens"] > 900


def test_low_rank_adapters(llama, engine, adapter):
    asked, adapted = prompts(700, 300), LoRARequest("random", 1, str(adapter))
    with_lora = {"enable_lora": True, "max_lora_rank": 8}
    engines = engine(llama, **with_lora), engine(llama, KEEP_ALL, max_num_batched_tokens=222, **with_lora)
    plain, host = (generate(engines[0], asked, lora=lora) for lora in (None, adapted))
    assert generate(engines[1], asked, lora=adapted) == host != plain
    assert counters()["sparse_tokens"] > 900
    assert generate(engines[1], asked) == plain


FORMS = {"sinks": torch.tensor([5.0, 8.0, -1.0, 6.0]), "logits_soft_cap": 0.5}  # what vLLM calls them
OURS = {"sinks": "stem_sinks", "logits_soft_cap": "stem_softcap"}


@pytest.mark.parametrize("form", FORMS)
def test_layers_of_other_forms(form, llama, expected, engine, monkeypatch):
    engines = engine(llama), engine(llama, KEEP_ALL, max_num_batched_tokens=97)
    for llm in engines:
        for layer in llm.llm_engine.vllm_config.compilation_config.static_forward_context.values():
            for name in (form, OURS[form]):
                monkeypatch.setattr(layer.impl, name, FORMS[form], raising=False)
    host, stem = (generate(llm, prompts(*LENGTHS)) for llm in engines)
    assert stem == host != expected
    assert counters()["sparse_tokens"] > 2000


def test_gemma2(models, engine, calls):
    model = models("Gemma2Config", num_hidden_layers=3, sliding_window=96, attn_logit_softcapping=2.0, query_pre_attn_scalar=1)
    tokens = generate(engine(model), prompts(700, 300))
    assert generate(engine(model, KEEP_ALL, max_num_batched_tokens=222), prompts(700, 300)) == tokens
    assert counters()["sparse_tokens"] > 900
    assert {call.softcap for call in calls} == {2.0}


def test_gpt_oss(models, engine, calls):
    destroy_model_parallel()
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    fields = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 96, "layer_types": kinds}
    model = models("GptOssConfig", num_hidden_layers=3, **fields)
    tokens = generate(engine(model), prompts(700, 300))
    assert generate(engine(model, KEEP_ALL, max_num_batched_tokens=222), prompts(700, 300)) == tokens
    assert counters()["sparse_tokens"] > 900
    assert all(call.sinks.shape == (4,) and call.sinks.any() for call in calls)


def test_rows_out_of_order_are_gathered(llama, expected, engine, monkeypatch):
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


def test_guessed_tokens_are_checked_by_the_host(llama, engine):
    asked = [[i * i * k % 509 for i in range(1, length)] for k, length in ((3, 900), (5, 60), (7, 500))]
    guess = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    llm = engine(llama, KEEP_ALL, max_num_batched_tokens=333, speculative_config=guess)
    assert generate(llm, asked, tokens=8) == generate(engine(llama), asked, tokens=8)
    assert llm.llm_engine.vllm_config.speculative_config.method == "ngram"
    assert counters()["sparse_tokens"] > 1400
